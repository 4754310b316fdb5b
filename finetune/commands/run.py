"""The whole way: check → train → evaluate → merge → one question → report."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.common.errors import ArtifactError
from finetune.common.run_folder import RunFolder, refuse_several_processes
from finetune.data.predictions import Prediction, read_predictions
from finetune.recipe.load import load_recipe


@dataclass(frozen=True)
class RunResult:
    """`metrics`: what metrics.json holds; `answer`: of the merged model to the question of `prediction`."""

    folder: RunFolder
    metrics: dict[str, Any]
    prediction: Prediction
    answer: str
    report: Path


def run(
    recipe: Path | str,
    overrides: Sequence[str] = (),
    run: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> RunResult:
    """check → train → evaluate → merge → one question about one held-out row → report. Arguments: see `train`."""
    from finetune.commands.check import check

    refuse_several_processes("`finetune run`")
    check(recipe, overrides)  # so that a mistake is reported before torch is imported
    from finetune.evaluation.evaluate import evaluate
    from finetune.evaluation.report.report import report
    from finetune.merging.merge import merge
    from finetune.training.train import train

    folder = train(load_recipe(recipe, overrides), run, resume, overwrite)
    metrics = evaluate(folder.path)
    merge(folder.path)
    first = read_predictions(folder.predictions)[0]
    return RunResult(folder, metrics, first, answer_of(folder.merged, first), report(folder.path))


def answer_of(merged: Path, prediction: Prediction) -> str:
    """The merged model's answer, from a process of its own: the folder must do for anyone who has nothing else. Raises
    ArtifactError.
    """
    media = [part for medium in prediction.media for part in (f"--{medium.kind}", str(medium.path))]
    command = [sys.executable, "-m", "finetune.commands.cli", "chat", str(merged), prediction.question, *media]
    finished = subprocess.run([*command, "--task", prediction.task], capture_output=True, text=True)
    if finished.returncode:
        raise ArtifactError(f"{merged} doesn't answer: {finished.stderr.strip()}")
    return finished.stdout.strip()
