"""Confidence intervals of scores by the percentile bootstrap (Efron 1979): rows are resampled, groups whole."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Measure = Mapping[str, Any]  # what a task's `measure` gives for a row


def intervals(
    rows: Sequence[Measure],
    score: Callable[[list[Any]], dict[str, float]],
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Metric -> (low, high), the middle `level` of its values over `resamples` samples of as many rows, drawn with
    replacement.

    Rows with the same non-empty "group" are drawn together, and as a new group each time. A metric that fewer than half
    of the samples have is left out; with fewer than two rows or groups, all are.
    """
    units = _units(rows)
    if len(units) < 2:
        return {}
    generator, values = np.random.default_rng(seed), dict[str, list[float]]()
    grouped = any(row.get("group") for row in rows)
    for _ in range(resamples):
        drawn = generator.integers(len(units), size=len(units)).tolist()
        if grouped:
            sample = [{**row, "group": copy} for copy, unit in enumerate(drawn, 1) for row in units[unit]]
        else:
            sample = [units[unit][0] for unit in drawn]
        for metric, value in score(sample).items():
            values.setdefault(metric, []).append(value)
    ends = [(1 - level) / 2, (1 + level) / 2]
    quantiles = {metric: np.quantile(own, ends) for metric, own in values.items() if 2 * len(own) >= resamples}
    return {metric: (float(low), float(high)) for metric, (low, high) in quantiles.items()}


def _units(rows: Sequence[Measure]) -> list[list[Measure]]:
    """What is drawn at once: a row, or the rows of a group."""
    units: dict[object, list[Measure]] = {}
    for number, row in enumerate(rows):
        units.setdefault(("group", row["group"]) if row.get("group") else number, []).append(row)
    return list(units.values())
