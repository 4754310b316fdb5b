# %% [markdown] en
# # Speech to text and intent
#
# Teaches a language model to write down what a caller says, and to tell what they want, on one free T4. As it is, the
# notebook uses 576 short calls from the repository: Mandarin, spoken by a synthesiser. It runs from top to bottom without a
# click. For your own recordings, set `DATA`.

# %% [markdown] zh
# # 语音转文字与意图识别
#
# 在一块免费的 T4 上，教语言模型写下来电者说的话，并判断其意图。默认使用仓库自带的 576 段普通话来电（语音合成），从头到尾无需任何
# 点击。要换成自己的录音，设置 `DATA` 即可。

# %% include install

# %% [markdown] en
# ## Settings
#
# `DATA` is a table (CSV, TSV, XLSX, JSONL) with a column of paths to recordings, one of transcripts and one of intents.
# WAV, FLAC, Ogg and MP3 are read, at any sampling rate. With `UPLOAD` ticked, you are asked for a ZIP file of the table
# and its recordings. A new `NAME` begins a new run.

# %% [markdown] zh
# ## 设置
#
# `DATA` 是一张表格（CSV、TSV、XLSX、JSONL），一列是录音的路径，一列是转写文本，一列是意图。支持 WAV、FLAC、Ogg 和 MP3，采样率
# 不限。勾选 `UPLOAD` 后，会要求上传包含表格和录音的 ZIP 文件。换一个 `NAME` 就会开始一次新的训练。

# %%
# @title Settings  #:en
# @title 设置  #:zh
DATA = "kit/recipes/data/calls/train.csv"  # @param {type:"string"}
AUDIO_COLUMN = "audio"  # @param {type:"string"}
TEXT_COLUMN = "text"  # @param {type:"string"}
INTENT_COLUMN = "intent"  # @param {type:"string"}
TRANSCRIBE = "Write down what is said."  # @param {type:"string"}  #:en
TRANSCRIBE = "写下录音的内容。"  # @param {type:"string"}  #:zh
INTENT = "What does the caller want?"  # @param {type:"string"}  #:en
INTENT = "来电者想要什么？"  # @param {type:"string"}  #:zh
UPLOAD = False  # @param {type:"boolean"}
DRIVE = False  # @param {type:"boolean"}
NAME = "speech"  # @param {type:"string"}
LLM = "Qwen/Qwen2.5-1.5B-Instruct"  # @param {type:"string"}
ENCODER = "openai/whisper-small"  # @param {type:"string"}
DTYPE = "float16"  # @param ["float16", "bfloat16", "float32"]
EPOCHS = 2  # @param {type:"integer"}
DATA_LICENSE = "apache-2.0"  # @param {type:"string"}
REPO = ""  # @param {type:"string"}

# %% include folder

# %% include upload

# %% [markdown] en
# ## The recipe
#
# One file of rows, two tasks: the transcript is written by the language model, the intent is chosen by a label head with a
# probability for each label. Whisper's encoder gives 50 vectors a second; the projector makes 6 tokens a second of them.

# %% [markdown] zh
# ## 配方
#
# 同一份数据，两个任务：转写文本由语言模型生成；意图由标签头选出，并给出每个标签的概率。Whisper 的编码器每秒输出 50 个向量，投影
# 层把它们压缩成每秒约 6 个词元。

# %%
import finetune

recipe = finetune.Recipe(
    name=NAME,
    seed=7,
    model={
        "llm": {"name": LLM, "quantize": "nf4", "dtype": DTYPE},
        "encoders": {"audio": {"kind": "whisper", "name": ENCODER}},
        "projectors": {"audio": {"kind": "stack", "factor": 8}},
    },
    data=[
        {
            "name": "transcript",
            "path": DATA,
            "task": {"kind": "transcribe", "prompt": TRANSCRIBE},
            "columns": {"audio": AUDIO_COLUMN, "text": TEXT_COLUMN},
            "hold_out": 0.2,
        },
        {
            "name": "intent",
            "path": DATA,
            "task": {"kind": "classify", "media": ["audio"], "prompt": INTENT, "label": "intent"},
            "columns": {"audio": AUDIO_COLUMN, "intent": INTENT_COLUMN},
            "head": "label",
            "hold_out": 0.2,
        },
    ],
    train={
        "save_every_n_steps": 50,
        "tokens_per_batch": "auto",
        "stages": [
            {"name": "hear", "trains": ["projectors", "heads"], "learning_rate": 1e-3, "epochs": 2},
            {
                "name": "tune",
                "trains": ["projectors", "adapter", "heads"],
                "learning_rate": 2e-4,
                "epochs": EPOCHS,
            },
        ],
    },
    evaluate={"limit": 400, "max_new_tokens": 64},
    publish={"licenses": {"data": DATA_LICENSE}, "languages": ["zh"]},
)
finetune.check(recipe)

# %% include train

# %% include scores

# %% include merge

# %% [markdown] en
# About a held-out recording, or the one in `RECORDING`.

# %% [markdown] zh
# 默认使用一段留出的录音，也可以用 `RECORDING` 指定。

# %%
# @title Ask  #:en
# @title 提问  #:zh
from IPython.display import Audio

RECORDING = ""  # @param {type:"string"}

recording = RECORDING or held_out[0]["media"][0]
display(Audio(filename=recording))
print(model.answer(TRANSCRIBE, audio=recording))
probabilities = model.probabilities(INTENT, task="intent", audio=recording)
for label in sorted(probabilities, key=probabilities.get, reverse=True)[:3]:
    print(f"{probabilities[label]:.2f}  {label}")

# %% include publish
