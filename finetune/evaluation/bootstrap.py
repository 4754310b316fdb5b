"""How far a score could have come out otherwise, had other rows been drawn: percentile bootstrap (Efron 1979)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]


def intervals(
    rows: Rows,
    score: Callable[[list[Any]], dict[str, float]],
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """{metric: (low, high)} that holds the middle `level` of its values over as many rows drawn with replacement.

    Rows with the same "group", where it isn't empty, are drawn together, and as a group of its own each time. A metric
    that fewer than half of the draws have is left out; so are all of them with fewer than two rows or groups.
    """
    units = _units(rows)
    if len(units) < 2:
        return {}
    generator, found = np.random.default_rng(seed), dict[str, list[float]]()
    grouped = any(row.get("group") for row in rows)
    for _ in range(resamples):
        drawn = generator.integers(len(units), size=len(units)).tolist()
        if grouped:
            chosen = [{**row, "group": copy} for copy, unit in enumerate(drawn, 1) for row in units[unit]]
        else:
            chosen = [units[unit][0] for unit in drawn]
        for metric, value in score(chosen).items():
            found.setdefault(metric, []).append(value)
    ends = [(1 - level) / 2, (1 + level) / 2]
    kept = {metric: np.quantile(values, ends) for metric, values in found.items() if 2 * len(values) >= resamples}
    return {metric: (float(low), float(high)) for metric, (low, high) in kept.items()}


def _units(rows: Rows) -> list[list[Mapping[str, Any]]]:
    """What is drawn at once: a row, or the rows of a group."""
    units: dict[Any, list[Mapping[str, Any]]] = {}
    for number, row in enumerate(rows):
        units.setdefault(("group", row["group"]) if row.get("group") else number, []).append(row)
    return list(units.values())
