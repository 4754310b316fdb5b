# %% [markdown] en name install
# ## Install
#
# Clones the repository into `kit/` and installs what Colab lacks, in about a minute. torch, numpy and whatever else the
# kernel has loaded stay as they are, so no restart is needed.

# %% [markdown] zh name install
# ## 安装
#
# 把代码仓库克隆到 `kit/`，并安装 Colab 缺少的软件包，大约需要一分钟。torch、numpy 以及内核已经加载的其他软件包保持不变，
# 因此无需重启会话。

# %% name install
%%bash
set -e
[ -d kit ] || git clone --quiet --depth 1 https://github.com/{REPOSITORY} kit
python3 -c "import finetune" 2>/dev/null || kit/notebooks/install.sh python3

# %% [markdown] en name folder
# ## Where the run is kept
#
# Colab may disconnect at any time, and then everything on its disk is lost. With `DRIVE` ticked, the run folder, with its
# checkpoints, is on Google Drive: run the notebook again with the same settings, and training goes on where it stopped.

# %% [markdown] zh name folder
# ## 结果存放在哪里
#
# Colab 随时可能断开连接，届时本地磁盘上的内容会全部丢失。勾选 `DRIVE` 后，运行目录连同检查点都保存在 Google 云端硬盘上：
# 断线后用相同的设置重新运行本笔记本，训练就会从中断处继续。

# %% name folder
from pathlib import Path

WORK = Path.cwd()
if DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")
    WORK = Path("/content/drive/MyDrive/finetune")
RUN = WORK / "runs" / NAME
print(RUN)

# %% name upload
if UPLOAD:
    import shutil

    from google.colab import files

    (archive,) = files.upload()
    shutil.rmtree("uploaded", ignore_errors=True)
    shutil.unpack_archive(archive, "uploaded")
    # An archive of a folder has that folder inside; macOS adds one of its own.  #:en
    # 压缩整个目录时，解压后外面还有一层目录；macOS 还会附加一个自己的目录。  #:zh
    inside = [path for path in Path("uploaded").iterdir() if path.name != "__MACOSX" and path.name[0] != "."]
    folder = inside[0] if len(inside) == 1 and inside[0].is_dir() else Path("uploaded")
    tables = [path for path in folder.iterdir() if path.suffix in (".csv", ".tsv", ".xlsx", ".jsonl")]
    DATA = str(tables[0] if len(tables) == 1 else folder)
    print(DATA)

# %% [markdown] en name train
# ## Train
#
# The curve below the bar is the loss of the current stage. To stop, interrupt the cell: a checkpoint is written first, and
# running the cell again continues from it.

# %% [markdown] zh name train
# ## 训练
#
# 进度条下方的曲线是当前阶段的损失。需要停止时中断该单元格即可：程序会先写出检查点，再次运行该单元格便从检查点继续。

# %% name train
started = (RUN / "recipe.yaml").is_file()
finetune.train(recipe, RUN, resume=started)

# %% [markdown] en name scores
# ## Scores on held-out rows
#
# *tuned* is the trained model, *base* the model before training. *blank* and *shuffled* are the trained model with its
# media emptied or exchanged between rows: a model that uses them scores clearly lower there. *probe* is a linear
# classifier on the encoder's features, a baseline.

# %% [markdown] zh name scores
# ## 留出数据上的得分
#
# *tuned* 是训练后的模型，*base* 是训练前的模型。*blank* 和 *shuffled* 仍是训练后的模型，但媒体分别被清空、在各行之间打乱：
# 如果模型确实用到了媒体，这两列的得分会明显更低。*probe* 是在编码器特征上训练的线性分类器，作为基线。

# %% name scores
finetune.evaluate(RUN)

# %% [markdown] en name merge
# ## Merge, and ask the model
#
# The merged model is one folder that needs nothing else. It is compared with the trained model before it is kept; how
# close they are stands in its certificate.

# %% [markdown] zh name merge
# ## 合并，向模型提问
#
# 合并后的模型是一个独立的目录，不依赖其他文件。写出之前会与训练出的模型比较，二者的差距记录在证书中。

# %% name merge
import json

if not (RUN / "certificate.json").is_file():
    finetune.merge(RUN)
model = finetune.load(RUN)
held_out = [json.loads(line) for line in (RUN / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]

# %% [markdown] en name publish
# ## Publish
#
# Checks the run, and writes the model card and the files to publish into `published/` of the run folder. If `REPO` is set
# and there is a token with write access, in Colab's secrets as `HF_TOKEN`, the adapter is uploaded: into a **private**
# repository, unless you make it public. Without a token nothing leaves this machine. The card needs the licence of your
# rows, as the Hub spells it; some held-out rows become samples on it.

# %% [markdown] zh name publish
# ## 发布
#
# 检查运行结果，并在运行目录的 `published/` 中写出模型卡片和待发布的文件。如果填写了 `REPO`，并且 Colab 的“密钥”中有一个名为
# `HF_TOKEN`、具有写权限的令牌，就会上传适配器；新建的仓库默认为**私有**。没有令牌时不会上传任何内容。模型卡片需要注明数据的
# 许可证（采用 Hub 上的写法），并会展示几条留出的数据作为示例。

# %% name publish
from huggingface_hub import get_token

UPLOAD_NOW = bool(REPO and get_token())
pushed = finetune.push(RUN, REPO or None, dry_run=not UPLOAD_NOW)
pushed
