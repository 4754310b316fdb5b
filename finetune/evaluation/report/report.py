"""Report: a run folder as one HTML page that needs no other file and no network. Imports no torch."""

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from finetune.common import certificate, display
from finetune.common.run_folder import RunLike, write_text
from finetune.data.metrics import lower_is_better
from finetune.evaluation import plots
from finetune.evaluation.report import tables, words
from finetune.evaluation.report.content import Content, read_content
from finetune.evaluation.report.examples import Album, examples
from finetune.evaluation.report.headline import headlines
from finetune.evaluation.results import TaskTables
from finetune.evaluation.uncertainty import FEWEST

FEW = 3  # answers of a task and side that are shown at once; the others are folded
CHART = (5.0, 3.0)  # inches: text stays readable where a phone shrinks it


@dataclass(frozen=True)
class Report:
    """A page that is written; functions of the standard library take it as its path."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        return display.page(self.path.read_text(encoding="utf-8")) + display.files({"report": self.path})


def report(run: RunLike, out: Path | str | None = None) -> Report:
    """Write the report of a run to RUN/report.html or `out` (a file, or a folder for report.html). Only the run folder
    is read, and the media that its predictions name; the page says what is missing. Raises ArtifactError if `run` isn't
    a run folder.
    """
    content = read_content(run)
    path = Path(run) / "report.html" if out is None else Path(out)
    path = path / "report.html" if path.is_dir() else path
    write_text(path, page(content))
    return Report(path)


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("finetune.evaluation.report", ""),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": words.number,
        "plain": words.plain,
        "value": words.value,
        "condition": words.condition,
        "lower_is_better": lower_is_better,
        "meaning": words.meaning,
        "shorten": words.shorten,
        "duration": words.duration,
    }
    return environment


def page(content: Content) -> str:
    environment = _templates()
    album = Album(content.limits)
    chosen = examples(content.predictions, album)
    script = environment.get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        content=content,
        missing=[*content.missing, *_media_notes(content, album, bool(chosen))],
        headlines=headlines(content),
        score_tables=tables.score_tables(content),
        label_details=[details for task in content.metrics.scores if (details := _label_details(content, task))],
        charts=_curves(content),
        stages=tables.stages(content),
        examples=chosen,
        components=tables.components(content),
        sources=tables.sources(content),
        max_rows=tables.MAX_ROWS,
        few=FEW,
        fewest=FEWEST,
        costs=tables.costs(content),
        comparison=certificate.comparison(content.certificate) if content.certificate else None,
        style=Markup(environment.get_template("page.css").render()),
        script=Markup(script),
        script_digest=digest,
    )


@dataclass(frozen=True)
class Chart:
    """`label` says in words what the picture, a data URI, shows."""

    caption: str
    label: str
    uri: str


@dataclass(frozen=True)
class LabelDetails:
    """A task's scores label by label."""

    task: str
    labels: tables.LabelTable | None
    confusion: tables.ConfusionMatrix | None
    calibration: Chart | None


def _label_details(content: Content, task: str) -> LabelDetails | None:
    by_label = content.metrics.tables.get(task, TaskTables())
    labels, confusion = tables.label_table(by_label), tables.confusion_matrix(by_label.confusion)
    bins = tables.calibration(content.predictions_of(task))
    chart = None
    if bins:
        error = content.metrics.scores[task].get("calibration_error", {}).get("tuned")
        points = "; ".join(f"{accuracy:.0%} right at {sure:.0%} confidence ({n} rows)" for sure, accuracy, n in bins)
        caption = "Calibration: accuracy over confidence; the dotted line is perfect. Larger dots stand for more rows."
        caption += "" if error is None else f" Calibration error {words.number(error)}."
        chart = Chart(
            caption, f"Calibration: {points}", display.data_uri("image/png", plots.png(plots.calibration_figure(bins)))
        )
    return LabelDetails(task, labels, confusion, chart) if labels or confusion or chart else None


def _curves(content: Content) -> list[Chart]:
    """The losses, and each task's scores on validation rows."""
    stages = content.metrics.train.stages
    losses = {name: stage.losses for name, stage in stages.items() if stage.losses}
    if not losses:
        return []
    last = [values[-1] for values in losses.values()][-1]
    figure = display.data_uri("image/png", plots.png(plots.losses_figure(losses, *CHART)))
    charts = [Chart("Loss, and its running mean", f"Loss of each step, {last:.3f} at the end", figure)]
    passes = [one for stage in stages.values() for one in stage.validation]
    for task in dict.fromkeys(task for one in passes for task in one.scores):
        if (drawn := plots.validation_figure(stages, task, *CHART)) is not None:
            title = f"Scores of {task} on validation rows, over the steps"
            charts.append(Chart(title, title, display.data_uri("image/png", plots.png(drawn))))
    return charts


def _media_notes(content: Content, album: Album, shown: bool) -> list[str]:
    notes = []
    if album.broken:
        notes.append(f"{album.broken} media of the predictions below can't be shown: they were moved or damaged")
    if album.left_out:
        notes.append(f"{album.left_out} media of the predictions below are left out to keep the page small")
    if content.predictions and not shown:
        notes.append("predictions.jsonl has no scores per row: `finetune evaluate` writes them")
    return notes
