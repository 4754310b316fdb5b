"""The whole way: check → train → evaluate → report → merge → one question → report."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high
from typing import TYPE_CHECKING

from finetune.common import display
from finetune.common.certificate import Certificate
from finetune.common.errors import ArtifactError, MergeRefused
from finetune.common.run_folder import RunFolder, RunLike, refuse_several_processes
from finetune.data.predictions import Prediction, read_predictions
from finetune.evaluation.evaluation_result import EvaluationResult
from finetune.evaluation.report.words import readable
from finetune.recipe.load import RecipeLike, as_recipe

if TYPE_CHECKING:
    from finetune.evaluation.report.report import Report


@dataclass(frozen=True, repr=False)
class RunResult:
    """`answer`: of the merged model to the question of `prediction`."""

    evaluation: EvaluationResult
    certificate: Certificate
    prediction: Prediction
    answer: str
    report: "Report"

    @property
    def folder(self) -> RunFolder:
        return self.evaluation.folder

    def __repr__(self) -> str:
        return f"{self.evaluation!r}\n{self.certificate!r}\n{self.folder!r}"

    def _repr_html_(self) -> str:
        question = f"{self.prediction.question} {self.answer} (right: {readable(self.prediction.target)})"
        certificate, folder = self.certificate._repr_html_(), self.folder._repr_html_()
        return "".join([self.evaluation._repr_html_(), certificate, display.line(question), folder])


def run(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    run: RunLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_scores: Callable[[EvaluationResult], None] | None = None,
) -> RunResult:
    """check → train → evaluate → report → merge → one question about one held-out row → report. Arguments: see `train`.

    `on_scores`: called with the scores when they and the first report are written. Raises as each of these
    does; where the merge is refused, MergeRefused, after a report that says so.
    """
    from finetune.commands.check import check

    refuse_several_processes("`finetune run`")
    recipe = as_recipe(recipe, overrides)
    RunFolder(Path(run or Path("runs") / recipe.name)).refuse_taken(resume, overwrite)
    checked = check(recipe)  # so that a mistake is reported before torch is imported
    from finetune.common.progress import console
    from finetune.evaluation.evaluate import evaluate
    from finetune.evaluation.report.report import report
    from finetune.merging.merge import merge
    from finetune.training.train import train

    for line in checked.remarks():
        console.print(line)
    folder = train(checked.recipe, run, resume, overwrite)
    evaluation = evaluate(folder)
    report(folder)
    if on_scores is not None:
        on_scores(evaluation)
    try:
        certificate = merge(folder)
    except MergeRefused as refused:
        raise MergeRefused(f"{refused}\nthe scores stand, and {report(folder).path} says this too") from None
    written = report(folder)
    shown = typical(read_predictions(folder.predictions))
    answer = answer_of(folder.merged, shown, checked.recipe.evaluate.max_new_tokens)
    return RunResult(evaluation, certificate, shown, answer, written)


def typical(predictions: Sequence[Prediction]) -> Prediction:
    """Of the first task's rows the first that is answered neither better nor worse than the median: right where most
    are.
    """
    known = [one for one in predictions if one.task == predictions[0].task and one.good is not None]
    middle = median_high(one.good for one in known if one.good is not None) if known else None
    return next((one for one in known if one.good == middle), predictions[0])


def answer_of(merged: Path, prediction: Prediction, max_new_tokens: int) -> str:
    """The merged model's answer, from a process of its own: the folder must do for anyone who has nothing else. Raises
    ArtifactError.
    """
    media = [part for medium in prediction.media for part in (f"--{medium.kind}", str(medium.path))]
    command = [sys.executable, "-m", "finetune.commands.cli", "chat", str(merged), prediction.question, *media]
    command += ["--task", prediction.task, "--max-new-tokens", str(max_new_tokens)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise ArtifactError(f"{merged} doesn't answer: {finished.stderr.strip()}")
    return finished.stdout.strip()
