"""What a run folder holds, read for its report. Missing and damaged files are reported on the page, not raised."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from finetune.common.certificate import Certificate, read_certificate
from finetune.common.errors import ArtifactError, RecipeError
from finetune.common.run_folder import RunFolder, RunLike, damaged, read_json
from finetune.data.metrics import main_metric
from finetune.data.predictions import Prediction
from finetune.data.rows import SplitSummary
from finetune.evaluation.results import Metrics
from finetune.model.bindings import TaskBinding
from finetune.model.manifest import AdapterManifest
from finetune.recipe.explain import explain, recipe_error
from finetune.recipe.load import Recipe
from finetune.recipe.schema import Limits, Source, outline, task_names
from finetune.recipe.yaml_reader import read_text, read_yaml

CONSEQUENCES = {
    "metrics.json": "losses, scores and times are unknown: `finetune train` and `finetune evaluate` write them",
    "predictions.jsonl": "no predictions can be shown: `finetune evaluate` writes them",
    "data/summary.json": "the numbers of rows are unknown: `finetune train` writes them",
    "versions.json": "package versions are unknown: `finetune train` writes them",
    "adapter/multimodal.json": "there is no adapter, and commits are those in the recipe: training hasn't finished",
}
T = TypeVar("T")


@dataclass(frozen=True)
class SkippedRow:
    """`where`: file:row."""

    where: str
    reason: str


@dataclass(frozen=True)
class Content:
    """The files of a run, empty or None for those that can't be read; `missing` says in sentences which, and what is
    lost. `commits`: llm, encoders.NAME -> commit on the Hub. `skipped`: rows that were left out or have errors.
    """

    name: str
    recipe: Recipe | None
    metrics: Metrics
    predictions: list[Prediction]
    splits: dict[str, SplitSummary]
    versions: dict[str, str | int]
    certificate: Certificate | None
    commits: dict[str, str | None]
    bindings: dict[str, TaskBinding]
    skipped: list[SkippedRow]
    missing: list[str]

    @cached_property
    def sources(self) -> list[tuple[str, Source]]:
        """(task binding, source) of each source."""
        sources = self.recipe.data if self.recipe else []
        names = task_names(sources)
        return list(zip(names, sources, strict=True))

    @property
    def limits(self) -> Limits:
        return self.recipe.media if self.recipe else Limits()

    def predictions_of(self, task: str) -> list[Prediction]:
        return [prediction for prediction in self.predictions if prediction.task == task]

    def rows_of(self, task: str) -> int:
        """Number of held-out rows scored."""
        return self.metrics.scored_rows.get(task, len(self.predictions_of(task)))

    def primary(self, task: str, metrics: Sequence[str]) -> str:
        """The main one of a task's metrics; the first if that can't be known."""
        tasks = [source.task for name, source in self.sources if name == task]
        return main_metric(tasks[0].primary if tasks else "", metrics)


def read_content(run: RunLike) -> Content:
    """Raises ArtifactError if `run` isn't a run folder."""
    folder = RunFolder.open(run)
    run = folder.path
    missing: list[str] = []

    def read(name: str, load: Callable[[Path], T], default: T) -> T:
        path = run / name
        if not path.is_file():
            missing.extend([f"{name} is missing: {CONSEQUENCES[name]}"] if name in CONSEQUENCES else [])
            return default
        try:
            return load(path)
        except (ArtifactError, RecipeError) as error:
            missing.append(str(error).replace(f"{run}{os.sep}", ""))
        except ValidationError as error:
            missing.append(str(damaged(name, error, "its figures aren't shown")))
        return default

    def json_as(kind: type[T]) -> Callable[[Path], T]:
        return lambda path: TypeAdapter(kind).validate_python(read_json(path))

    recipe = read("recipe.yaml", _recipe, None)
    metrics = read("metrics.json", json_as(Metrics), Metrics())
    adapter = read("adapter/multimodal.json", lambda path: AdapterManifest.read(path.parent), None)
    predictions: list[Prediction] = read(
        "predictions.jsonl", lambda path: _lines(path, path.name, Prediction.from_json, missing), []
    )
    skipped: list[SkippedRow] = read("data/check.json", _checked, [])
    content = Content(
        name=recipe.name if recipe else run.resolve().name,
        recipe=recipe,
        metrics=metrics,
        predictions=predictions,
        splits=read("data/summary.json", json_as(dict[str, SplitSummary]), {}),
        versions=read("versions.json", json_as(dict[str, str | int]), {}),
        certificate=read("certificate.json", read_certificate, None),
        commits=_commits(adapter) if adapter else {},
        bindings=adapter.bindings if adapter else {},
        skipped=[
            *skipped,
            *_quarantined(recipe, missing),
            *_unreadable(folder.data / "unreadable.jsonl", missing),
            *_left_out(folder.data / "suspects.jsonl", missing),
        ],
        missing=missing,
    )
    if folder.metrics.is_file() and not metrics.scores:
        missing.append("metrics.json holds no scores: `finetune evaluate` hasn't finished")
    if metrics.scores and not metrics.comparisons:
        missing.append("metrics.json holds no comparisons of the conditions: `finetune evaluate` writes them")
    if folder.metrics.is_file() and not metrics.train.stages:
        missing.append("metrics.json holds no losses: `finetune train` hasn't finished")
    return content


def _recipe(path: Path) -> Recipe:
    """The resolved recipe; the files that it names may be gone by now. Raises RecipeError."""
    try:
        document = read_yaml(read_text(path), path.name)
        if not isinstance(document.value, dict):
            raise RecipeError(f"{path.name}: isn't a mapping of keys")
        try:
            return Recipe.without_files(document.value)
        except ValidationError as error:
            raise recipe_error(document, explain(document, error.errors(include_url=False), outline())) from None
    except RecipeError as error:
        raise RecipeError(f"{error}; the model and its data are unknown") from None


def _commits(adapter: AdapterManifest) -> dict[str, str | None]:
    encoders = adapter.model.encoders.items()
    revisions = {f"encoders.{medium}": getattr(encoder.options, "revision", None) for medium, encoder in encoders}
    return {adapter.model.language_part: adapter.model.language_model.revision, **revisions}


def _checked(path: Path) -> list[SkippedRow]:
    """Rows with errors, as `finetune data check` lists them. Raises ArtifactError."""
    try:
        findings = read_json(path)["list"]
        return [_skipped(entry, "line", entry["text"]) for entry in findings if entry["severity"] == "error"]
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged: {error!r}") from None


def _quarantined(recipe: Recipe | None, missing: list[str]) -> list[SkippedRow]:
    """The rows in quarantine.jsonl beside the sources."""
    rows = []
    paths = {source.path for source in recipe.data} if recipe else set()
    for folder in sorted({path if path.is_dir() else path.parent for path in paths}):
        path = folder / "quarantine.jsonl"
        name = f"{path.name} beside the sources"
        rows += _lines(path, name, lambda entry: _skipped(entry, "row", "; ".join(entry["reasons"])), missing)
    return rows


def _unreadable(path: Path, missing: list[str]) -> list[SkippedRow]:
    """The rows that training left out since their media couldn't be read."""

    def unreadable(entry: dict[str, Any]) -> tuple[bool, SkippedRow]:
        return entry["left_out"], SkippedRow(entry["row"], entry["what"])

    return [row for left_out, row in _lines(path, f"data/{path.name}", unreadable, missing) if left_out]


def _left_out(path: Path, missing: list[str]) -> list[SkippedRow]:
    """The rows that training left out since their loss wasn't finite, each once a stage."""

    def suspect(entry: dict[str, Any]) -> tuple[bool, tuple[str, str], SkippedRow]:
        reason = f"left out of the stage {entry['stage']} from step {entry['step']:,} on: {entry['what']}"
        return entry["left_out"], (entry["row"], entry["stage"]), SkippedRow(entry["row"], reason)

    suspects = _lines(path, f"data/{path.name}", suspect, missing)
    firsts = {place: row for left_out, place, row in reversed(suspects) if left_out}
    return [*reversed(firsts.values())]


def _skipped(entry: dict[str, Any], number: str, reason: str) -> SkippedRow:
    """`number`: the key of the row's number, which is null where the reason is about the file."""
    name = Path(entry["file"]).name
    return SkippedRow(name if entry[number] is None else f"{name}:{entry[number]}", reason)


def _lines(path: Path, name: str, parse: Callable[[Any], T], missing: list[str]) -> list[T]:
    """The entries of a file of JSON lines, [] without a file; `missing` gets a note of lines that hold none."""
    if not path.is_file():
        return []
    entries, unreadable = [], []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    entries.append(parse(json.loads(line)))
                except (ValueError, KeyError, TypeError):
                    unreadable.append(number)
    if unreadable:
        missing.append(f"{name}: {len(unreadable):,} lines can't be read, the first is line {unreadable[0]}")
    return entries
