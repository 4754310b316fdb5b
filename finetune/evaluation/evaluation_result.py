"""What `evaluate` returns."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from finetune.common import display
from finetune.common.run_folder import RunFolder
from finetune.data.predictions import read_predictions
from finetune.evaluation.report.content import Content, read_content
from finetune.evaluation.results import Comparison, Metrics, ScoreTables

if TYPE_CHECKING:
    from finetune.evaluation.report.tables import Score


@dataclass(frozen=True, repr=False)
class EvaluationResult:
    """Scores of the run in `folder`. `written`: where metrics.json, predictions.jsonl and plots/ are: the run's own
    folder, or one for rows that its recipe doesn't name. `metrics`: what metrics.json holds, which
    `finetune.evaluation.results` documents.
    """

    folder: RunFolder
    written: RunFolder
    metrics: Metrics

    @classmethod
    def of(cls, folder: RunFolder, written: RunFolder | None = None) -> "EvaluationResult":
        written = written or folder
        return cls(folder, written, Metrics.model_validate(written.read_metrics()))

    @property
    def content(self) -> Content:
        """What tables and sentences about the scores are made from."""
        content = read_content(self.folder)
        if self.written.path == self.folder.path:
            return content
        return replace(content, metrics=self.metrics, predictions=read_predictions(self.written.predictions))

    @property
    def scores(self) -> ScoreTables:
        """{task: {metric: {condition: value}}}"""
        return self.metrics.scores

    @property
    def intervals(self) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
        """95% confidence intervals: {task: {metric: {condition: (low, high)}}}"""
        return self.metrics.intervals

    @property
    def comparisons(self) -> dict[str, dict[str, dict[str, Comparison]]]:
        """The trained model minus another condition: {task: {metric: {condition: comparison}}}"""
        return self.metrics.comparisons

    @property
    def rows(self) -> dict[str, int]:
        """{task: number of rows scored}"""
        return self.metrics.scored_rows

    def __repr__(self) -> str:
        from finetune.evaluation.report.headline import headlines

        lines = [f"EvaluationResult of {self.written.path}"]
        for one in headlines(self.content):
            tuned = one.scores[0]
            interval = f" (95% CI {tuned.interval})" if tuned.interval else ""
            lines.append(f"  {one.task}: {one.metric} {tuned.value:.3f}{interval}, n = {one.rows:,}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from finetune.evaluation.report.headline import headlines
        from finetune.evaluation.report.tables import score_tables

        content = self.content
        shown = []
        for scores in score_tables(content):
            shown.append(display.heading(f"{scores.task}, n = {scores.rows:,}"))
            rows = [(row.metric + " ↓" * row.lower_is_better, *map(_cell, row.cells)) for row in scores.metrics]
            shown.append(display.table(("", *scores.conditions), rows))
        shown += [display.line(one.sentence) for one in headlines(content)]
        folder = self.written
        paths = {"metrics": folder.metrics, "predictions": folder.predictions}
        return "".join([*shown, display.picture(folder.plots / "scores.png"), display.files(paths)])


def _cell(score: "Score | None") -> str:
    """A value with its 95% confidence interval."""
    if score is None:
        return ""
    return f"{score.value:.3f}" + (f" ({score.interval})" if score.interval else "")
