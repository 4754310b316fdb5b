# %% [markdown] en
# # Captions for your pictures
#
# Teaches a language model to describe pictures in your words, on one free T4. As it is, the notebook uses 870 emoji with
# their names from the repository, and runs from top to bottom without a click. For your own pictures, set `DATA`.

# %% [markdown] zh
# # 为自己的图片生成描述
#
# 在一块免费的 T4 上，教语言模型用你的措辞描述图片。默认使用仓库自带的 870 张表情图片及其名称，从头到尾无需任何点击。要换成自己的
# 图片，设置 `DATA` 即可。

# %% include install

# %% [markdown] en
# ## Settings
#
# `DATA` is a table (CSV, TSV, XLSX, JSONL) with a column of paths and a column of captions; paths are relative to the
# table. With `UPLOAD` ticked, you are asked for a ZIP file of the table and its pictures. A new `NAME` begins a new run.

# %% [markdown] zh
# ## 设置
#
# `DATA` 是一张表格（CSV、TSV、XLSX、JSONL），一列是图片路径，一列是描述；路径相对于表格所在的目录。勾选 `UPLOAD` 后，会要求上传
# 包含表格和图片的 ZIP 文件。换一个 `NAME` 就会开始一次新的训练。

# %%
# @title Settings  #:en
# @title 设置  #:zh
DATA = "kit/recipes/data/emoji/train.csv"  # @param {type:"string"}
IMAGE_COLUMN = "image"  # @param {type:"string"}
CAPTION_COLUMN = "name_en"  # @param {type:"string"}  #:en
CAPTION_COLUMN = "name_zh"  # @param {type:"string"}  #:zh
QUESTION = "Describe the picture in a few words."  # @param {type:"string"}  #:en
QUESTION = "用几个字描述这张图片。"  # @param {type:"string"}  #:zh
UPLOAD = False  # @param {type:"boolean"}
DRIVE = False  # @param {type:"boolean"}
NAME = "captions"  # @param {type:"string"}
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
# A fifth of the pictures is held out, for the scores. A T4 computes in float16, and the language model is stored in 4 bits
# (nf4). First the projector learns to translate pictures for the frozen model, then projector and LoRA learn together.

# %% [markdown] zh
# ## 配方
#
# 留出五分之一的图片用来评分。T4 以 float16 计算，语言模型以 4 位（nf4）存储。第一阶段只训练投影层，让它把图片转换成冻结的
# 语言模型能理解的表示；第二阶段同时训练投影层和 LoRA。

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
            "task": {"kind": "caption", "prompt": QUESTION},
            "columns": {"image": IMAGE_COLUMN, "caption": CAPTION_COLUMN},
            "hold_out": 0.2,
        }
    ],
    train={
        "save_every_n_steps": 50,
        "tokens_per_batch": "auto",
        "stages": [
            {"name": "align", "trains": ["projectors"], "learning_rate": 1e-3, "epochs": 1},
            {"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 2e-4, "epochs": EPOCHS},
        ],
    },
    evaluate={"limit": 200, "max_new_tokens": 32},
    publish={"licenses": {"data": DATA_LICENSE}, "languages": ["en"]},  #:en
    publish={"licenses": {"data": DATA_LICENSE}, "languages": ["zh"]},  #:zh
)
finetune.check(recipe)

# %% include train

# %% include scores

# %% include merge

# %% [markdown] en
# Four held-out pictures with the right caption and the model's. Then your own, if you set `PICTURE`.

# %% [markdown] zh
# 四张留出的图片，附上正确的描述和模型的描述。设置 `PICTURE` 后，还会描述你自己的图片。

# %%
# @title Ask  #:en
# @title 提问  #:zh
from IPython.display import Image, display

PICTURE = ""  # @param {type:"string"}

for row in held_out[:4]:
    display(Image(row["media"][0], width=96))
    print(row["target"][0], "→", row["tuned"])
if PICTURE:
    display(Image(PICTURE, width=320))
    print(model.answer(QUESTION, image=PICTURE, max_new_tokens=32))
else:
    print(model.answer(QUESTION, image=row["media"][0], max_new_tokens=32))

# %% include publish
