"""Fine-tune a frozen LLM with encoders for pictures, sound and video: recipe → train → evaluate → merge → chat.

Every command of the command line is one function here; torch is imported when one that needs it is first called.
"""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.commands.chat import chat
    from finetune.commands.check import check
    from finetune.commands.data_check import data_check
    from finetune.commands.data_describe import data_describe
    from finetune.commands.data_label import data_label
    from finetune.commands.data_pairs import PairOptions, data_pairs
    from finetune.commands.data_preview import data_preview
    from finetune.commands.doctor import doctor
    from finetune.commands.init import init
    from finetune.commands.plan import plan
    from finetune.commands.predict import PredictOptions, predict
    from finetune.commands.recipes import recipes
    from finetune.commands.run import run
    from finetune.common.run_folder import RunFolder
    from finetune.data.check.split import SplitPlan, data_split
    from finetune.data.describe.options import DescribeOptions
    from finetune.evaluation.evaluate import evaluate
    from finetune.evaluation.report.report import report
    from finetune.export._run import export_run
    from finetune.merging.merge import merge
    from finetune.model.load import load
    from finetune.publishing.pull import pull
    from finetune.publishing.push import push
    from finetune.recipe.load import Recipe, load_recipe
    from finetune.recipe.schema import schema
    from finetune.serving.serve import serve
    from finetune.training.sweep import sweep
    from finetune.training.train import train

_HOME = {
    "DescribeOptions": "data.describe.options",
    "PairOptions": "commands.data_pairs",
    "PredictOptions": "commands.predict",
    "Recipe": "recipe.load",
    "RunFolder": "common.run_folder",
    "SplitPlan": "data.check.split",
    "chat": "commands.chat",
    "check": "commands.check",
    "data_check": "commands.data_check",
    "data_describe": "commands.data_describe",
    "data_label": "commands.data_label",
    "data_pairs": "commands.data_pairs",
    "data_preview": "commands.data_preview",
    "data_split": "data.check.split",
    "evaluate": "evaluation.evaluate",
    "doctor": "commands.doctor",
    "export_run": "export._run",
    "init": "commands.init",
    "load": "model.load",
    "load_recipe": "recipe.load",
    "merge": "merging.merge",
    "predict": "commands.predict",
    "plan": "commands.plan",
    "pull": "publishing.pull",
    "push": "publishing.push",
    "recipes": "commands.recipes",
    "report": "evaluation.report.report",
    "run": "commands.run",
    "schema": "recipe.schema",
    "serve": "serving.serve",
    "sweep": "training.sweep",
    "train": "training.train",
}

__all__ = [
    "DescribeOptions",
    "PairOptions",
    "PredictOptions",
    "Recipe",
    "RunFolder",
    "SplitPlan",
    "chat",
    "check",
    "data_check",
    "data_describe",
    "data_label",
    "data_pairs",
    "data_preview",
    "data_split",
    "doctor",
    "evaluate",
    "export_run",
    "init",
    "load",
    "load_recipe",
    "merge",
    "plan",
    "predict",
    "pull",
    "push",
    "recipes",
    "report",
    "run",
    "schema",
    "serve",
    "sweep",
    "train",
]


# As it is imported, it warns about kernels that aren't used.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    import importlib
    import warnings

    warnings.filterwarnings("ignore", message="IProgress not found")  # widgets that aren't used
    return getattr(importlib.import_module(f"finetune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
