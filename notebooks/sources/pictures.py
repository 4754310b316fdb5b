# %% [markdown] en
# # Your pictures to labels
#
# Teaches a language model to name what kind of thing is in a picture, on one free T4. As it is, the notebook uses 870 emoji
# from the repository, and runs from top to bottom without a click. For your own pictures, set `DATA`.

# %% [markdown] zh
# # 用自己的图片训练分类模型
#
# 在一块免费的 T4 上，教语言模型说出图片里是哪一类东西。默认使用仓库自带的 870 张表情图片，从头到尾无需任何点击。要换成自己的
# 图片，设置 `DATA` 即可。

# %% include install

# %% [markdown] en
# ## Settings
#
# `DATA` is either a folder with one subfolder of pictures per label, or a table (CSV, TSV, XLSX, JSONL) with a column of
# paths and a column of labels. With `UPLOAD` ticked, you are asked for a ZIP file of either. A new `NAME` begins a new run.

# %% [markdown] zh
# ## 设置
#
# `DATA` 可以是一个目录，每个标签一个子目录，里面放图片；也可以是一张表格（CSV、TSV、XLSX、JSONL），一列是图片路径，一列是
# 标签。勾选 `UPLOAD` 后，会要求上传包含上述目录或表格的 ZIP 文件。换一个 `NAME` 就会开始一次新的训练。

# %%
# @title Settings  #:en
# @title 设置  #:zh
DATA = "kit/recipes/data/emoji/train.csv"  # @param {type:"string"}
IMAGE_COLUMN = "image"  # @param {type:"string"}
LABEL_COLUMN = "label_en"  # @param {type:"string"}  #:en
LABEL_COLUMN = "label"  # @param {type:"string"}  #:zh
QUESTION = "What kind of thing is this?"  # @param {type:"string"}  #:en
QUESTION = "图片里是哪一类东西？"  # @param {type:"string"}  #:zh
UPLOAD = False  # @param {type:"boolean"}
DRIVE = False  # @param {type:"boolean"}
NAME = "pictures"  # @param {type:"string"}
LLM = "Qwen/Qwen2.5-1.5B-Instruct"  # @param {type:"string"}
ENCODER = "google/siglip-base-patch16-224"  # @param {type:"string"}
DTYPE = "float16"  # @param ["float16", "bfloat16", "float32"]
EPOCHS = 2  # @param {type:"integer"}
DATA_LICENSE = "ofl-1.1"  # @param {type:"string"}
REPO = ""  # @param {type:"string"}

# %% include folder

# %% include upload

# %% [markdown] en
# ## The recipe
#
# Everything that is trained stands in one recipe. A fifth of the pictures is held out, for the scores. A T4 computes in
# float16, and the language model is stored in 4 bits (nf4). First the projector learns to translate pictures for the
# frozen model, then projector, LoRA and label head learn together.

# %% [markdown] zh
# ## 配方
#
# 训练的全部内容都写在一份配方里。留出五分之一的图片用来评分。T4 以 float16 计算，语言模型以 4 位（nf4）存储。第一阶段只训练
# 投影层，让它把图片转换成冻结的语言模型能理解的表示；第二阶段同时训练投影层、LoRA 和标签头。

# %%
import finetune

recipe = finetune.Recipe(
    name=NAME,
    seed=7,
    model={
        "llm": {"name": LLM, "quantize": "nf4", "dtype": DTYPE},
        "encoders": {"image": {"kind": "vision", "name": ENCODER, "layer": -2}},
        "projectors": {"image": {"kind": "pixel_shuffle", "factor": 2}},
    },
    data=[
        {
            "path": DATA,
            "task": {"kind": "classify", "prompt": QUESTION},
            "columns": {"image": IMAGE_COLUMN, "label": LABEL_COLUMN} if Path(DATA).is_file() else {},
            "head": "label",
            "hold_out": 0.2,
        }
    ],
    train={
        "save_every_n_steps": 50,
        "tokens_per_batch": "auto",
        "stages": [
            {"name": "align", "trains": ["projectors", "heads"], "learning_rate": 1e-3, "epochs": 1},
            {
                "name": "tune",
                "trains": ["projectors", "adapter", "heads"],
                "learning_rate": 2e-4,
                "epochs": EPOCHS,
            },
        ],
    },
    evaluate={"limit": 500},
    publish={"licenses": {"data": DATA_LICENSE}, "languages": ["en"]},  #:en
    publish={"licenses": {"data": DATA_LICENSE}, "languages": ["zh"]},  #:zh
)
finetune.check(recipe)

# %% include train

# %% include scores

# %% include merge

# %% [markdown] en
# About a held-out picture, or the one in `PICTURE`.

# %% [markdown] zh
# 默认使用一张留出的图片，也可以用 `PICTURE` 指定。

# %%
# @title Ask  #:en
# @title 提问  #:zh
from IPython.display import Image, display

PICTURE = ""  # @param {type:"string"}

picture = PICTURE or held_out[0]["media"][0]
display(Image(picture, width=160))
probabilities = model.probabilities(QUESTION, image=picture)
for label in sorted(probabilities, key=probabilities.get, reverse=True)[:3]:
    print(f"{probabilities[label]:.2f}  {label}")

# %% include publish
