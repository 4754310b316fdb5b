"""Report: a run folder as one page that needs nothing but itself, and no network. Imports no torch."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from finetune.common.run_folder import write_text
from finetune.evaluation import plots
from finetune.evaluation.report import tables, words
from finetune.evaluation.report.content import Content, read_content
from finetune.evaluation.report.examples import Album, examples
from finetune.evaluation.report.headline import headlines, one_line

CHART = (5.0, 3.0)  # inches: text stays readable where a phone shrinks it


def report(run: Path | str, out: Path | str | None = None) -> Path:
    """Write what a run was, learnt and cost to one HTML file, RUN/report.html or `out` (a file, or a folder to put
    report.html into), and return its path. Only the run folder is read, and the media that its predictions name; what
    isn't there is said on the page. Raises ArtifactError where `run` isn't a run folder.
    """
    content = read_content(Path(run))
    path = Path(run) / "report.html" if out is None else Path(out)
    path = path / "report.html" if path.is_dir() else path
    write_text(path, page(content))
    return path


def summary_line(run: Path | str) -> str:
    """The primary metric of each task in one line; "not evaluated yet" where there is none. Raises ArtifactError."""
    content = read_content(Path(run))
    return one_line(headlines(content)) or f"{content.name}: not evaluated yet"


def page(content: Content) -> str:
    environment = Environment(
        loader=PackageLoader("finetune.evaluation.report", ""),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name: getattr(words, name) for name in ("number", "plain", "meaning", "shorten", "duration", "options")
    }
    album = Album(content.limits)
    shown = examples(content.predictions, album)
    script = environment.get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        content=content,
        train=content.metrics.get("train", {}),
        missing=[*content.missing, *_media_notes(content, album, bool(shown))],
        headlines=headlines(content),
        score_tables=tables.score_tables(content),
        tasks=[_task(content, task) for task in content.metrics.get("scores", {})],
        charts=_curves(content),
        stages=tables.stages(content),
        examples=shown,
        parts=tables.parts(content),
        sources=tables.sources(content),
        skipped=content.skipped[: tables.LISTED],
        costs=tables.costs(content),
        merged=tables.merged(content),
        style=Markup(environment.get_template("page.css").render()),
        script=Markup(script),
        script_digest=digest,
    )


def _task(content: Content, task: str) -> dict[str, Any]:
    """Tables and charts of one task."""
    found = content.metrics.get("tables", {}).get(task, {})
    bins = tables.calibration([row for row in content.predictions if row.get("task") == task])
    label = "How often it is right, over how sure it is: " + "; ".join(
        f"{right:.0%} right where {sure:.0%} sure ({count} rows)" for sure, right, count in bins
    )
    place = list(content.metrics["scores"]).index(task)
    chart = plots.svg(plots.calibration_figure(bins), f"calibration-{place}", label) if bins else ""
    return {
        "task": task,
        "labels": tables.label_table(found),
        "confusion": tables.confusion(found),
        "calibration": Markup(chart),
        "calibration_error": content.metrics["scores"][task].get("calibration_error", {}).get("tuned"),
    }


def _curves(content: Content) -> list[tuple[str, Markup]]:
    """(caption, SVG) of the losses, and of each task's scores on validation rows."""
    stages = content.metrics.get("train", {}).get("stages", {})
    if not any(stage.get("losses") for stage in stages.values()):
        return []
    last = [stage["losses"][-1] for stage in stages.values() if stage.get("losses")][-1]
    loss = plots.svg(plots.losses_figure(stages, *CHART), "loss", f"Loss of each step, at last {last:.3f}")
    charts = [("Loss, and its running mean", Markup(loss))]
    measured = [one for stage in stages.values() for one in stage.get("validation") or []]
    for number, task in enumerate(dict.fromkeys(task for one in measured for task in one["scores"])):
        figure = plots.validation_figure(stages, task, *CHART)
        if figure is not None:
            told = f"Scores of {task} on validation rows, over the steps"
            charts.append((told, Markup(plots.svg(figure, f"validation-{number}", told))))
    return charts


def _media_notes(content: Content, album: Album, shown: bool) -> list[str]:
    notes = []
    if album.broken:
        notes.append(f"{album.broken} media of the predictions below can't be shown: moved, or damaged since")
    if album.left_out:
        notes.append(f"{album.left_out} media of the predictions below are left out, to keep the page small")
    if content.predictions and not shown:
        notes.append("predictions.jsonl doesn't say how good its answers are: `finetune evaluate` writes it anew")
    return notes
