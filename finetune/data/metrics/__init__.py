"""Metrics that tasks share. What is costly is worked out per row, in plain numbers that sum up: a score over any choice
of rows is then cheap, and can be drawn a thousand times (`bootstrap`).

What tasks import at module level imports numpy and the like where it is used: `finetune check` does without them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def means(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, float]:
    """The mean of each name over rows that all hold it."""
    return {name: float(sum(row[name] for row in rows)) / len(rows) for name in names}
