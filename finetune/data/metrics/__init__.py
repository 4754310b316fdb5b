"""Metrics of the tasks. Costly parts are computed once per row, as numbers that add up: a score over any selection of
rows is then cheap enough for a thousand resamples (`finetune/evaluation/uncertainty.py`).

Numpy and the like are imported inside functions: tasks import these modules, and `finetune check` does without numpy.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from typing import Any, TypeAlias

Measures: TypeAlias = dict[str, Any]  # what the metrics need of one row; each module says which keys
Rows: TypeAlias = Sequence[Mapping[str, Any]]  # such measures


def lower_is_better(metric: str) -> bool:
    return "error" in metric


def main_metric(primary: str, metrics: Iterable[str]) -> str:
    """The one of a task's metrics that stands for it: `primary`, or the first if these rows have no such score."""
    known = list(metrics)
    return primary if primary in known or not known else known[0]


def share_interval(right: float, rows: int) -> tuple[float, float]:
    """The 95% interval of a share of right rows (Wilson 1927)."""
    share, z2 = right / rows, 1.959963984540054**2 / rows
    half = sqrt(z2 * (share * (1 - share) + z2 / 4))
    return max(0.0, (share + z2 / 2 - half) / (1 + z2)), min(1.0, (share + z2 / 2 + half) / (1 + z2))


def means(rows: Rows, names: Iterable[str]) -> dict[str, float]:
    """The mean of each name over rows that all have it."""
    return {name: float(sum(row[name] for row in rows)) / len(rows) for name in names}
