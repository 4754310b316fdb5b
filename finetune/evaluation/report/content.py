"""What a run folder holds, read for its report. Missing and damaged files are reported on the page, not raised."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pydantic import AliasPath, Field, TypeAdapter, ValidationError

from finetune.common.certificate import Certificate, read_certificate
from finetune.common.errors import ArtifactError, RecipeError
from finetune.common.registry import load_part
from finetune.common.run_folder import JsonObject, RunFolder, read_json
from finetune.data.media import Limits
from finetune.evaluation.results import Metrics, Prediction, Result
from finetune.recipe.conflicts import source_names
from finetune.recipe.explain import explain
from finetune.recipe.schema import Recipe, Source, cached_schema
from finetune.recipe.yaml_reader import read_text, read_yaml, refusal

CONSEQUENCES = {
    "metrics.json": "losses, scores and times are unknown: `finetune train` and `finetune evaluate` write them",
    "predictions.jsonl": "no predictions can be shown: `finetune evaluate` writes them",
    "data/summary.json": "the numbers of rows are unknown: `finetune train` writes them",
    "versions.json": "package versions are unknown: `finetune train` writes them",
    "adapter/multimodal.json": "there is no adapter, and commits are those in the recipe: training hasn't finished",
}
T = TypeVar("T")


class SplitSummary(Result):
    """A split in data/summary.json."""

    rows: int = 0
    media: int | None = None
    different_answers: int | None = None
    answers: dict[str, int] = Field(default={})


class SavedBinding(Result):
    """A task binding in multimodal.json: the kinds of its task and head, and what the head learned from the rows."""

    task: str = Field(default="", validation_alias=AliasPath("task", "kind"))
    head: str = Field(default="", validation_alias=AliasPath("head", "kind"))
    settings: dict[str, object] = Field(default={})


class SavedEncoder(Result):
    revision: str | None = Field(default=None, validation_alias=AliasPath("options", "revision"))


class SavedAdapter(Result):
    """adapter/multimodal.json, as far as a reader needs it."""

    revision: str | None = Field(default=None, validation_alias=AliasPath("language_model", "revision"))
    encoders: dict[str, SavedEncoder] = Field(default={})
    bindings: dict[str, SavedBinding] = Field(default={}, validation_alias="asks")

    def commits(self) -> dict[str, str | None]:
        """llm, encoders.NAME -> commit on the Hub."""
        return {"llm": self.revision, **{f"encoders.{name}": part.revision for name, part in self.encoders.items()}}


class Finding(Result):
    """What `finetune data check` found in a row, in data/check.json."""

    severity: str = ""
    file: str = ""
    line: int | None = None
    text: str = ""


class CheckedData(Result):
    list: Sequence[Finding] = ()


class QuarantinedRow(Result):
    file: str = ""
    row: int | None = None
    reasons: str | list[str] = ""


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
    bindings: dict[str, SavedBinding]
    skipped: list[SkippedRow]
    missing: list[str]

    @cached_property
    def sources(self) -> list[tuple[str, Source]]:
        """(task binding, source) of each source."""
        sources = self.recipe.data if self.recipe else []
        names = source_names([(s.name, s.task.kind, s.task.options.model_dump_json()) for s in sources])
        return list(zip(names, sources, strict=True))

    @property
    def limits(self) -> Limits:
        return Limits(**self.recipe.media.model_dump()) if self.recipe else Limits()

    def predictions_of(self, task: str) -> list[Prediction]:
        return [prediction for prediction in self.predictions if prediction.task == task]

    def primary(self, task: str, metrics: Sequence[str]) -> str:
        """The main one of a task's metrics; the first if that can't be known."""
        kind = next((source.task.kind for name, source in self.sources if name == task), task)
        try:
            primary = load_part("tasks", kind).PRIMARY
        except RecipeError:  # a task that this version doesn't have
            return metrics[0]
        return next((name for name in metrics if name.partition("@")[0] == primary.partition("@")[0]), metrics[0])


def read_content(run: Path) -> Content:
    """Raises ArtifactError if `run` isn't a run folder."""
    folder = RunFolder.open(run)
    missing: list[str] = []

    def read(name: str, kind: TypeAdapter[T], default: T) -> T:
        path = run / name
        if not path.is_file():
            missing.extend([f"{name} is missing: {CONSEQUENCES[name]}"] if name in CONSEQUENCES else [])
            return default
        try:
            return kind.validate_python(read_json(path))
        except ArtifactError as error:
            missing.append(str(error).replace(str(path), name))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            missing.append(f"{name} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}")
        return default

    recipe = _recipe(folder.recipe, missing)
    metrics = read("metrics.json", TypeAdapter(Metrics), Metrics())
    adapter = read("adapter/multimodal.json", TypeAdapter(SavedAdapter), SavedAdapter())
    checked = read("data/check.json", TypeAdapter(CheckedData), CheckedData())
    content = Content(
        name=recipe.name if recipe else run.resolve().name,
        recipe=recipe,
        metrics=metrics,
        predictions=_predictions(folder.predictions, missing),
        splits=read("data/summary.json", TypeAdapter(dict[str, SplitSummary]), {}),
        versions=read("versions.json", TypeAdapter(dict[str, str | int]), {}),
        certificate=_certificate(folder.certificate, missing),
        commits=adapter.commits(),
        bindings=adapter.bindings,
        skipped=_skipped(checked, recipe, missing),
        missing=missing,
    )
    if folder.metrics.is_file() and not metrics.scores:
        missing.append("metrics.json holds no scores: `finetune evaluate` hasn't finished")
    if folder.metrics.is_file() and not metrics.train.stages:
        missing.append("metrics.json holds no losses: `finetune train` hasn't finished")
    return content


def _recipe(path: Path, missing: list[str]) -> Recipe | None:
    """The resolved recipe; the files that it names may be gone by now."""
    try:
        document = read_yaml(read_text(path), path.name)
        if not isinstance(document.value, dict):
            raise RecipeError(f"{path.name}: isn't a mapping of keys")
        try:
            return Recipe.model_validate(document.value)
        except ValidationError as error:
            raise refusal(document, explain(document, error.errors(include_url=False), cached_schema())) from None
    except RecipeError as error:
        missing.append(f"{error}; the model and its data are unknown")
        return None


def _certificate(path: Path, missing: list[str]) -> Certificate | None:
    if not path.is_file():
        return None
    try:
        return read_certificate(path)
    except ArtifactError as error:
        missing.append(str(error).replace(str(path), path.name))
        return None


def _predictions(path: Path, missing: list[str]) -> list[Prediction]:
    if not path.is_file():
        missing.append(f"{path.name} is missing: {CONSEQUENCES[path.name]}")
        return []
    lines, unreadable = _json_lines(path)
    if unreadable:
        missing.append(f"{path.name}: {len(unreadable):,} lines can't be read, the first is line {unreadable[0]}")
    return [Prediction.parse(line) for line in lines]


def _skipped(checked: CheckedData, recipe: Recipe | None, missing: list[str]) -> list[SkippedRow]:
    """Rows with errors in data/check.json, and those in quarantine.jsonl beside the sources."""
    rows = [
        SkippedRow(_where(finding.file, finding.line), finding.text)
        for finding in checked.list
        if finding.severity == "error"
    ]
    paths = {source.path for source in recipe.data} if recipe else set()
    for folder in sorted({path if path.is_dir() else path.parent for path in paths}):
        path = folder / "quarantine.jsonl"
        if not path.is_file():
            continue
        lines, unreadable = _json_lines(path)
        for number, line in enumerate(lines):
            try:
                row = QuarantinedRow.model_validate(line)
            except ValidationError:
                unreadable.append(number)
                continue
            reason = row.reasons if isinstance(row.reasons, str) else "; ".join(row.reasons)
            rows.append(SkippedRow(_where(row.file, row.row), reason))
        if unreadable:
            missing.append(f"{path.name} beside the sources: {len(unreadable):,} lines can't be read")
    return rows


def _where(file: str, row: int | None) -> str:
    return Path(file).name if row is None else f"{Path(file).name}:{row}"


def _json_lines(path: Path) -> tuple[list[JsonObject], list[int]]:
    """The objects in a file of JSON lines, and the numbers of the lines that hold none."""
    objects, unreadable = [], []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                objects.append(value)
            else:
                unreadable.append(number)
    return objects, unreadable
