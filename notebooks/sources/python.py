# %% [markdown] en
# # From Python alone
#
# Rows, recipe, training, scores, questions and publication, without a configuration file or a command. The pictures are
# drawn by the notebook itself: a circle, square or triangle in one of four colours, and a question about it.

# %% [markdown] zh
# # 只用 Python
#
# 数据、配方、训练、评分、提问和发布，全程不需要配置文件和命令行。图片由笔记本自己绘制：四种颜色之一的圆形、正方形或三角形，每张
# 配一个问题。

# %% include install

# %%
# @title Settings  #:en
# @title 设置  #:zh
PICTURES = 600  # @param {type:"integer"}
DRIVE = False  # @param {type:"boolean"}
NAME = "python"  # @param {type:"string"}
LLM = "Qwen/Qwen2.5-1.5B-Instruct"  # @param {type:"string"}
ENCODER = "google/siglip-base-patch16-224"  # @param {type:"string"}
DTYPE = "float16"  # @param ["float16", "bfloat16", "float32"]
EPOCHS = 2  # @param {type:"integer"}
REPO = ""  # @param {type:"string"}

# %% include folder

# %% [markdown] en
# ## Rows
#
# Any of the [nine formats](https://github.com/{REPOSITORY}/blob/main/docs/data.md) would do. Here it is a CSV file with the
# columns `image`, `question` and `answers`.

# %% [markdown] zh
# ## 数据
#
# [九种格式](https://github.com/{REPOSITORY}/blob/main/docs/data.md)都可以。这里用一个 CSV 文件，列名为 `image`、`question`
# 和 `answers`。

# %%
import csv
import random

from PIL import Image as Picture
from PIL import ImageDraw

COLOURS = {"red": "#d33", "green": "#2a2", "blue": "#36d", "yellow": "#dc2"}  #:en
SHAPES = {"circle": 60, "square": 4, "triangle": 3}  # corners  #:en
QUESTIONS = ("Which colour is it?", "Which shape is it?")  #:en
COLOURS = {"红色": "#d33", "绿色": "#2a2", "蓝色": "#36d", "黄色": "#dc2"}  #:zh
SHAPES = {"圆形": 60, "正方形": 4, "三角形": 3}  # 角的个数  #:zh
QUESTIONS = ("它是什么颜色？", "它是什么形状？")  #:zh

rows = Path("shapes")
rows.mkdir(exist_ok=True)
draw_of = random.Random(7)
with open(rows / "rows.csv", "w", newline="", encoding="utf-8") as file:
    table = csv.writer(file)
    table.writerow(["image", "question", "answers"])
    for number in range(PICTURES):
        colour, shape = draw_of.choice(list(COLOURS)), draw_of.choice(list(SHAPES))
        picture = Picture.new("RGB", (128, 128), "white")
        middle, radius = (draw_of.randint(44, 84), draw_of.randint(44, 84)), draw_of.randint(20, 40)
        circle, turn = (*middle, radius), draw_of.randint(0, 359)
        ImageDraw.Draw(picture).regular_polygon(circle, SHAPES[shape], rotation=turn, fill=COLOURS[colour])
        picture.save(rows / f"{number}.png")
        which = draw_of.randrange(2)
        table.writerow([f"{number}.png", QUESTIONS[which], (colour, shape)[which]])

# %% [markdown] en
# ## Recipe
#
# A recipe is a frozen object. Wrong keys and values are refused at once, with a message that says what to write.

# %% [markdown] zh
# ## 配方
#
# 配方是一个不可变的对象。写错的键或值会立即被拒绝，错误信息会说明应当怎么写。

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
    adapter={"rank": 16, "alpha": 32.0},
    data=[
        {
            "path": (rows / "rows.csv").resolve(),
            "task": {"kind": "vqa", "prompt": "Answer in one word."},  #:en
            "task": {"kind": "vqa", "prompt": "用一个词回答。"},  #:zh
            "hold_out": 0.2,
        }
    ],
    train={
        "save_every_n_steps": 50,
        "tokens_per_batch": "auto",
        "stages": [
            {"name": "align", "trains": ["projectors"], "learning_rate": 1e-3, "epochs": 2},
            {"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 2e-4, "epochs": EPOCHS},
        ],
    },
    evaluate={"max_new_tokens": 8},
    publish={"licenses": {"data": "cc0-1.0"}, "languages": ["en"]},  #:en
    publish={"licenses": {"data": "cc0-1.0"}, "languages": ["zh"]},  #:zh
)

# %% include train

# %% include scores

# %% include merge

# %%
from IPython.display import Image, display

for number in range(3):
    file = rows / f"{number}.png"
    display(Image(file, width=96))
    for question in QUESTIONS:
        print(question, model.answer(f"{question} Answer in one word.", image=file, max_new_tokens=8))  #:en
        print(question, model.answer(f"{question} 用一个词回答。", image=file, max_new_tokens=8))  #:zh

# %% include publish
