# %% [markdown] en
# # From a recipe to a published adapter
#
# Runs a recipe of the repository as it is: check, train, evaluate, merge, report; then publishes the adapter, downloads it
# and asks it, as anyone else would. It runs from top to bottom without a click; without a token it publishes nothing.

# %% [markdown] zh
# # 从现成的配方到发布适配器
#
# 原样运行仓库中的一份配方：检查、训练、评估、合并、生成报告；然后发布适配器，再像其他使用者一样下载并提问。从头到尾无需任何点击；
# 没有令牌时不会发布任何内容。

# %% include install

# %% [markdown] en
# ## Settings
#
# `CHANGES` are keys of the recipe with other values, as `train.stages.1.epochs=3`, separated by spaces. A new `NAME` begins
# a new run.

# %% [markdown] zh
# ## 设置
#
# `CHANGES` 用来修改配方中的键，例如 `train.stages.1.epochs=3`，多个修改以空格分隔。换一个 `NAME` 就会开始一次新的训练。

# %%
# @title Settings  #:en
# @title 设置  #:zh
RECIPE = "colab-t4"  # @param ["colab-t4", "transcribe-speech", "read-documents", "gpu-8gb"]
CHANGES = ""  # @param {type:"string"}
DTYPE = "float16"  # @param ["float16", "bfloat16", "float32"]
DRIVE = False  # @param {type:"boolean"}
NAME = "recipe"  # @param {type:"string"}
DATA_LICENSE = "ofl-1.1"  # @param {type:"string"}
REPO = ""  # @param {type:"string"}

# %% include folder

# %% [markdown] en
# ## The recipe, and others

# %% [markdown] zh
# ## 所选配方及其他配方

# %%
import finetune

path = Path("kit/recipes") / f"{RECIPE}.yaml"
print(path.read_text(encoding="utf-8"))
finetune.recipes()

# %% [markdown] en
# ## The whole way
#
# `finetune.run` checks the rows before anything is loaded, trains the stages with a live curve, scores held-out rows,
# merges, compares the merged model with the trained one, and asks it one question in a new process. After a disconnect it
# continues from the last checkpoint.

# %% [markdown] zh
# ## 一步到位
#
# `finetune.run` 在加载模型之前先检查数据，然后逐个阶段训练（带实时曲线），在留出数据上评分，合并，比较合并后的模型与训练出的模型，
# 最后在新进程中向合并后的模型提一个问题。断线后会从最近的检查点继续。

# %%
changes = [f"model.llm.dtype={DTYPE}", f"publish.licenses.data={DATA_LICENSE}", "train.save_every_n_steps=50"]
started = (RUN / "recipe.yaml").is_file()
result = finetune.run(path, [*changes, *CHANGES.split()], RUN, resume=started)
print(result.prediction.question)
print(result.prediction.target, "→", result.answer)

# %% [markdown] en
# ## The report
#
# Scores with intervals, curves, examples, cost: one page, which is also in the run folder.

# %% [markdown] zh
# ## 报告
#
# 得分及置信区间、曲线、示例、开销，都在一个页面上；该页面也保存在运行目录中。

# %%
import html

from IPython.display import HTML, display

page = html.escape((RUN / "report.html").read_text(encoding="utf-8"))
display(HTML(f'<div><iframe srcdoc="{page}" width="100%" height="600"></iframe></div>'))

# %% include publish

# %% [markdown] en
# ## Load it as others would
#
# From the Hub if it was uploaded, otherwise from the folder that would be. The adapter names the language model and the
# encoder by their commits on the Hub, so these few lines are all that anyone needs.

# %% [markdown] zh
# ## 像其他使用者一样加载
#
# 已上传时从 Hub 加载，否则从待发布的目录加载。适配器按 Hub 上的提交记录了语言模型和编码器，因此任何人只需要这几行代码。

# %%
published = "/".join(pushed.url.split("/")[-2:]) if pushed.url else pushed.folder
model = finetune.load(published)
media = {medium.kind: medium.path for medium in result.prediction.media}
print(model.answer(result.prediction.question, **media))
