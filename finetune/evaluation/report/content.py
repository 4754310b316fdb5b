"""What a run folder holds, read for its report. What isn't there, or can't be read, is said instead of failing."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.common.errors import ArtifactError, RecipeError
from finetune.common.registry import load_part
from finetune.common.run_folder import RunFolder, read_json
from finetune.recipe.conflicts import source_names
from finetune.recipe.schema import Limits
from finetune.recipe.yaml_reader import read_text, read_yaml

EXPECTED = {
    "metrics.json": "losses, scores and times are unknown: `finetune train` and `finetune evaluate` write them",
    "predictions.jsonl": "no predictions can be shown: `finetune evaluate` writes them",
    "data/summary.json": "how many rows there were is unknown: `finetune train` writes it",
    "versions.json": "versions of packages are unknown: `finetune train` writes them",
    "adapter/multimodal.json": "there is no adapter, and commits are those that the recipe asks for: training hasn't "
    "ended",
}


@dataclass(frozen=True)
class Content:
    """The files of a run, {} or [] for those that aren't there; `missing` says in sentences which, and what is lost.
    `skipped`: (file:row, why) of rows that were left out, or in error.
    """

    name: str
    recipe: dict[str, Any]
    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]
    splits: dict[str, Any]
    versions: dict[str, Any]
    certificate: dict[str, Any]
    adapter: dict[str, Any]
    skipped: list[tuple[str, str]]
    missing: list[str]

    @cached_property
    def sources(self) -> list[tuple[str, dict[str, Any]]]:
        """(what its scores are called, the source as the recipe has it) of each source."""
        sources = self.recipe.get("data", [])
        asked = []
        for source in sources:
            options = {key: value for key, value in source["task"].items() if key != "kind"}
            asked.append((source.get("name"), source["task"]["kind"], json.dumps(options, sort_keys=True)))
        return list(zip(source_names(asked), sources, strict=True))

    @property
    def limits(self) -> Limits:
        return Limits(**self.recipe.get("media", {}))

    def primary(self, task: str, metrics: Sequence[str]) -> str:
        """Of a task's metrics the one that stands for it; the first where that can't be known."""
        kind = next((source["task"]["kind"] for name, source in self.sources if name == task), task)
        try:
            wanted = load_part("tasks", kind).PRIMARY
        except RecipeError:  # a task that this version doesn't have
            return metrics[0]
        return next((name for name in metrics if name.partition("@")[0] == wanted.partition("@")[0]), metrics[0])


def read_content(run: Path) -> Content:
    """Raises ArtifactError where `run` isn't a run folder."""
    folder = RunFolder.open(run)
    missing: list[str] = []

    def json_of(name: str) -> dict[str, Any]:
        path = run / name
        if not path.is_file():
            missing.extend([f"{name} isn't there: {EXPECTED[name]}"] if name in EXPECTED else [])
            return {}
        try:
            content = read_json(path)
        except ArtifactError as error:
            missing.append(str(error).replace(str(path), name))
            return {}
        if not isinstance(content, dict):
            missing.append(f"{name} is damaged: it holds no object")
            return {}
        return content

    try:
        recipe = read_yaml(read_text(folder.recipe), "recipe.yaml").value
        if not isinstance(recipe, dict):
            raise RecipeError("recipe.yaml: holds no mapping of keys")
    except RecipeError as error:
        recipe = {}
        missing.append(f"{error}; what was trained on what is unknown")
    content = Content(
        name=str(recipe.get("name", run.resolve().name)),
        recipe=recipe,
        metrics=json_of("metrics.json"),
        predictions=_predictions(folder.predictions, missing),
        splits=json_of("data/summary.json"),
        versions=json_of("versions.json"),
        certificate=json_of("certificate.json"),
        adapter=json_of("adapter/multimodal.json"),
        skipped=_skipped(json_of("data/check.json"), recipe, missing),
        missing=missing,
    )
    if content.metrics and not content.metrics.get("scores"):
        missing.append("metrics.json holds no scores: `finetune evaluate` hasn't ended")
    if content.metrics and not content.metrics.get("train"):
        missing.append("metrics.json holds no losses: `finetune train` hasn't ended")
    return content


def _predictions(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        missing.append(f"{path.name} isn't there: {EXPECTED[path.name]}")
        return []
    found, wrong = _objects(path)
    if wrong:
        missing.append(f"{path.name}: {len(wrong):,} lines can't be read, the first is line {wrong[0]}")
    return found


def _skipped(checked: dict[str, Any], recipe: dict[str, Any], missing: list[str]) -> list[tuple[str, str]]:
    """Rows left out, or in error: errors of data/check.json, and what lies in quarantine.jsonl beside the sources."""
    found = [
        (_where(finding, "line"), str(finding.get("text", "")))
        for finding in checked.get("list", [])
        if finding.get("severity") == "error"
    ]
    folders = {Path(source["path"]) for source in recipe.get("data", []) if source.get("path")}
    for folder in sorted({path if path.is_dir() else path.parent for path in folders}):
        path = folder / "quarantine.jsonl"
        if not path.is_file():
            continue
        rows, wrong = _objects(path)
        if wrong:
            missing.append(f"{path.name} beside the sources: {len(wrong):,} lines can't be read")
        for row in rows:
            reasons = row.get("reasons", "")
            why = "; ".join(map(str, reasons)) if isinstance(reasons, list) else str(reasons)
            found.append((_where(row, "row"), why))
    return found


def _where(entry: dict[str, Any], key: str) -> str:
    file, line = Path(str(entry.get("file", ""))).name, entry.get(key)
    return file if line is None else f"{file}:{line}"


def _objects(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects of a file of JSON lines, and the numbers of the lines that hold none."""
    found, wrong = [], []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                found.append(row)
            else:
                wrong.append(number)
    return found, wrong
