"""Fine-tune a frozen LLM with an encoder for images, on one small GPU: recipe → train → evaluate → merge → chat.

Every command of the command line is one function here; torch is imported when one that needs it is first called.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.assistant import load
    from finetune.pipeline import recipes, run, sweep
    from finetune.recipe import Recipe, load_recipe, schema
    from finetune.stages.chat import chat
    from finetune.stages.check import check
    from finetune.stages.data_check import data_check
    from finetune.stages.data_label import data_label
    from finetune.stages.data_preview import data_preview
    from finetune.stages.data_split import data_split
    from finetune.stages.evaluate import evaluate
    from finetune.stages.export import export_run
    from finetune.stages.merge import merge
    from finetune.stages.pull import pull
    from finetune.stages.push import push
    from finetune.stages.report import report
    from finetune.stages.serve import serve
    from finetune.stages.train import train

_HOME = {
    "Recipe": "recipe",
    "chat": "stages.chat",
    "check": "stages.check",
    "data_check": "stages.data_check",
    "data_label": "stages.data_label",
    "data_preview": "stages.data_preview",
    "data_split": "stages.data_split",
    "evaluate": "stages.evaluate",
    "export_run": "stages.export",
    "load": "assistant",
    "load_recipe": "recipe",
    "merge": "stages.merge",
    "pull": "stages.pull",
    "push": "stages.push",
    "recipes": "pipeline",
    "report": "stages.report",
    "run": "pipeline",
    "schema": "recipe",
    "serve": "stages.serve",
    "sweep": "pipeline",
    "train": "stages.train",
}

__all__ = [
    "Recipe",
    "chat",
    "check",
    "data_check",
    "data_label",
    "data_preview",
    "data_split",
    "evaluate",
    "export_run",
    "load",
    "load_recipe",
    "merge",
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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"finetune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
