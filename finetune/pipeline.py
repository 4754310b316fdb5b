"""The whole way, and the recipes that come with the package."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.errors import ArtifactError, RecipeError
from finetune.recipe import load_recipe


def run(
    recipe: Path | str, overrides: Sequence[str] = (), run: Path | str | None = None, resume: bool = False
) -> dict[str, Any]:
    """check → train → evaluate → merge → one question about one held-out row → report. Returns paths, scores and the
    answer.
    """
    import json

    from finetune.run_folder import RunFolder, refuse_several_processes
    from finetune.stages.check import check
    from finetune.stages.evaluate import evaluate
    from finetune.stages.merge import merge
    from finetune.stages.report import report
    from finetune.stages.train import train

    refuse_several_processes("`finetune run`")
    check(recipe, overrides)
    folder: RunFolder = train(load_recipe(recipe, overrides), run, resume)
    metrics = evaluate(folder.path)
    merge(folder.path)
    first = json.loads(folder.predictions.read_text(encoding="utf-8").splitlines()[0])
    media = [part for kind, path in zip(first["kinds"], first["media"], strict=True) for part in (f"--{kind}", path)]
    # In a process of its own: the folder must do for anyone who is given nothing else.
    command = [sys.executable, "-m", "finetune.cli", "chat", str(folder.merged), first["question"], *media]
    command += ["--task", first["task"]]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode:
        raise ArtifactError(f"{folder.merged} doesn't answer: {asked.stderr.strip()}")
    answer = asked.stdout.strip()
    return {
        "scores": metrics["scores"],
        "intervals": metrics["intervals"],
        "question": first["question"],
        "media": first["media"],
        "answer": answer,
        "target": first["target"],
        "adapter": folder.adapter,
        "metrics": folder.metrics,
        "predictions": folder.predictions,
        "plots": folder.plots,
        "merged": folder.merged,
        "report": report(folder.path),
    }


def sweep(
    recipe: Path | str,
    over: Sequence[str],
    trials: int | None = None,
    overrides: Sequence[str] = (),
    run: Path | str | None = None,
) -> dict[str, Any]:
    """Train a recipe with other values of some keys, and compare on its validation rows: see `stages.sweep`."""
    from finetune.stages import sweep as stage
    from finetune.stages.train import train

    return stage.sweep(recipe, over, trials, overrides, run, train=train)


def recipes_folder() -> Path:
    """Beside the package in a checkout, inside it when installed."""
    inside = Path(__file__).parent / "_recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def recipes(copy: str | None = None, to: Path | str = ".") -> dict[str, str]:
    """{name: its first comment line}; with `copy`, that recipe is copied into the folder `to`. Raises RecipeError."""
    found = {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}
    if copy is not None:
        if copy not in found:
            raise RecipeError(f"no recipe is called {copy!r}. There are: {', '.join(found)}")
        target = Path(to) / found[copy].name
        if target.exists():
            raise RecipeError(f"{target} exists already; choose another folder with --to")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found[copy], target)
    return {name: _first_comment(path) for name, path in found.items()}


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()
