"""Metrics of the tasks. Costly parts are computed once per row, as numbers that add up: a score over any selection of
rows is then cheap enough for a thousand resamples (`finetune/evaluation/bootstrap.py`).

Numpy and the like are imported inside functions: tasks import these modules, and `finetune check` does without numpy.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

Measures: TypeAlias = dict[str, Any]  # what the metrics need of one row; each module says which keys
Rows: TypeAlias = Sequence[Mapping[str, Any]]  # such measures


def means(rows: Rows, names: Iterable[str]) -> dict[str, float]:
    """The mean of each name over rows that all have it."""
    return {name: float(sum(row[name] for row in rows)) / len(rows) for name in names}
