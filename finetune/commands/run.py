"""The whole way: check → train → evaluate → merge → one question → report."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.common.errors import ArtifactError
from finetune.recipe.load import load_recipe


def run(
    recipe: Path | str, overrides: Sequence[str] = (), run: Path | str | None = None, resume: bool = False
) -> dict[str, Any]:
    """check → train → evaluate → merge → one question about one held-out row → report. Returns paths, scores and the
    answer.
    """
    import json

    from finetune.commands.check import check
    from finetune.common.run_folder import RunFolder, refuse_several_processes

    refuse_several_processes("`finetune run`")
    check(recipe, overrides)  # so that a mistake is reported before torch is imported
    from finetune.evaluation.evaluate import evaluate
    from finetune.evaluation.report.report import report
    from finetune.merging.merge import merge
    from finetune.training.train import train

    folder: RunFolder = train(load_recipe(recipe, overrides), run, resume)
    metrics = evaluate(folder.path)
    merge(folder.path)
    first = json.loads(folder.predictions.read_text(encoding="utf-8").splitlines()[0])
    media = [part for kind, path in zip(first["kinds"], first["media"], strict=True) for part in (f"--{kind}", path)]
    # In a process of its own: the folder must do for anyone who is given nothing else.
    command = [sys.executable, "-m", "finetune.commands.cli", "chat", str(folder.merged), first["question"], *media]
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
