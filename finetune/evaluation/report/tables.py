"""The tables of a report: scores, labels, confusion, calibration, stages, parts, cost."""

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from finetune.common import certificate
from finetune.evaluation.report import words
from finetune.evaluation.report.content import Content

LABELS = 40  # shown as a table of who is taken for whom
LISTED = 200  # rows of any other table
PAIRS = 20  # of labels confused most
BINS = 10  # of calibration


def score_tables(content: Content) -> list[dict[str, Any]]:
    """Of each task {task, conditions, rows: [{metric, primary, less, cells: [{value, low, high}]}]}."""
    intervals = content.metrics.get("intervals", {})
    found = []
    for task, metrics in content.metrics.get("scores", {}).items():
        conditions = list(dict.fromkeys(name for values in metrics.values() for name in values))
        primary = content.primary(task, list(metrics)) if metrics else ""
        rows = []
        for metric, values in metrics.items():
            between = intervals.get(task, {}).get(metric, {})
            cells = [(values.get(name), *(between.get(name) or (None, None))) for name in conditions]
            less = words.less_is_better(metric)
            rows.append({"metric": metric, "primary": metric == primary, "less": less, "cells": cells})
        found.append({"task": task, "conditions": conditions, "rows": rows})
    return found


def label_table(tables: Mapping[str, Any]) -> dict[str, Any] | None:
    """{"metrics", "rows": [(label, values)], "left_out": number} of `per_label`."""
    labels = tables.get("per_label") or {}
    if not labels:
        return None
    metrics = list(dict.fromkeys(name for values in labels.values() for name in values))
    rows = [(label, [values.get(name) for name in metrics]) for label, values in labels.items()]
    return {"metrics": metrics, "rows": rows[:LISTED], "left_out": max(0, len(rows) - LISTED)}


def confusion(tables: Mapping[str, Any]) -> dict[str, Any] | None:
    """{"labels", "columns", "rows": [(label, total, [(count, share of the row, right or not)])], "pairs": [(right,
    said, count)]}; without rows where there are too many labels. A row is a right label, a column what was said.
    """
    found = tables.get("confusion") or {}
    labels, counts = found.get("labels", []), found.get("counts", [])
    if not labels:
        return None
    columns = [*labels, "none of them"][: max(map(len, counts), default=0)]
    if len(columns) > len(labels) and not any(row[-1] for row in counts):
        columns = labels
    pairs = [
        (label, said, count)
        for right, (label, row) in enumerate(zip(labels, counts, strict=False))
        for column, (said, count) in enumerate(zip(columns, row, strict=False))
        if count and right != column
    ]
    rows = []
    for right, (label, row) in enumerate(zip(labels, counts, strict=False)):
        total = sum(row)
        cells = [(count, count / max(total, 1), right == column) for column, count in enumerate(row[: len(columns)])]
        rows.append((label, total, cells))
    return {
        "labels": labels,
        "columns": columns,
        "rows": rows if len(labels) <= LABELS else [],
        "pairs": sorted(pairs, key=lambda pair: -pair[2])[:PAIRS],
    }


def calibration(predictions: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, int]]:
    """(mean confidence, share that is right, rows) of bins of equal width that hold rows; [] where no probabilities of
    single labels are there. The confidence is that of the label that was chosen.
    """
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row in predictions:
        sure, target = words.confidence(row.get("tuned")), row.get("target")
        right = target.get("label") if isinstance(target, dict) else target
        if sure is not None and math.isfinite(sure) and isinstance(right, str):
            bins.setdefault(min(int(sure * BINS), BINS - 1), []).append((sure, row["tuned"].get("label") == right))
    return [
        (sum(sure for sure, _ in rows) / len(rows), sum(right for _, right in rows) / len(rows), len(rows))
        for _, rows in sorted(bins.items())
    ]


def stages(content: Content) -> list[dict[str, Any]]:
    """The stages that the recipe names, with what is known of each."""
    done = content.metrics.get("train", {}).get("stages", {})
    found = []
    for stage in content.recipe.get("train", {}).get("stages", []):
        result = done.get(stage["name"], {})
        losses = result.get("losses") or []
        tenth = max(1, len(losses) // 10)
        begin, end = (sum(part) / len(part) for part in (losses[:tenth], losses[-tenth:])) if losses else (None, None)
        weights = result.get("trained_weights") or dict.fromkeys(stage.get("trains", []))
        found.append({**stage, "done": bool(result), **result, "weights": weights, "loss": (begin, end)})
    return found


def parts(content: Content) -> list[tuple[str, str, str, str]]:
    """(role, name, commit, options) of what the model is made of."""
    model, saved = content.recipe.get("model", {}), content.adapter
    rows = []
    if llm := model.get("llm"):
        commit = saved.get("language_model", {}).get("revision") or llm.get("revision")
        rows.append(("LLM", words.short_path(llm["name"]), commit, words.options(llm, "name", "revision")))
    for name, part in model.get("encoders", {}).items():
        options = saved.get("encoders", {}).get(name, {}).get("options", {})
        commit = options.get("revision") or part.get("revision")
        told = words.options(part, "kind", "name", "revision")
        rows.append((f"encoder of {name}", f"{part['kind']}: {words.short_path(part.get('name', ''))}", commit, told))
    for name, part in model.get("projectors", {}).items():
        rows.append((f"projector of {name}", part["kind"], None, words.options(part, "kind")))
    if fusion := model.get("fusion"):
        rows.append(("fusion", fusion["kind"], None, words.options(fusion, "kind")))
    if adapter := content.recipe.get("adapter"):
        rows.append(("adapter", "LoRA on the LLM", None, words.options(adapter)))
    for name, tuning in content.recipe.get("tune_encoders", {}).items():
        rows.append((f"tuning of {name}", "encoder", None, words.options(tuning)))
    return [(role, name, commit or "", options) for role, name, commit, options in rows]


def sources(content: Content) -> list[dict[str, Any]]:
    rows = []
    for name, source in content.sources:
        task = source["task"]
        rows.append(
            {
                "path": words.short_path(source["path"]),
                "name": name,
                "task": task["kind"],
                "prompt": words.shorten(str(task.get("prompt", "")), 200),
                "split": source.get("split", "train"),
                "told": words.options(
                    {
                        **{key: source.get(key) for key in ("hold_out", "hold_out_validation", "group")},
                        "weight": source.get("weight") if source.get("weight") != 1 else None,
                        "head": (source.get("head") or {}).get("kind"),
                    }
                ),
            }
        )
    return rows


def costs(content: Content) -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, [(part, how much)]) of time, memory and energy; [] where nothing is known."""
    shown = (
        ("Time", "seconds", words.duration),
        ("Most memory held", "peak_memory_bytes", words.memory),
        ("Energy", "energy_joules", words.energy),
    )
    return [
        (title, [(words.plain(part), told(value)) for part, value in content.metrics.get(key, {}).items()])
        for title, key, told in shown
    ]


def merged(content: Content) -> tuple[list[str], list[list[str]]] | None:
    """(columns, rows) of what the certificate compares; None where there is none, or one of another format."""
    found = content.certificate
    if found.get("format") != certificate.FORMAT or not isinstance(found.get("candidates"), dict):
        return None
    return certificate.cells(found)


def file_name(where: Any) -> str:
    return PurePath(str(where)).name
