"""Items of a group in an order, against how relevant each is."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def ranking_scores(rows: Rows, k: int) -> dict[str, float]:
    """Of rows of "group", "said" (a number, or None: below all) and "right" (relevance, 0 for none), means over groups:
    ndcg@k (gains as given, as sklearn's ndcg_score), hit_rate@k, mrr; auroc over groups with relevant and other items.

    Items with the same number come in any order: each metric is its mean over all of these. Groups without a relevant
    item can't be ranked well or badly: they are left out, and counted by `group_counts`.
    """
    found: dict[str, list[float]] = {}
    for said, right in _groups(rows).values():
        for metric, value in _group_scores(tuple(said), tuple(right), k).items():
            found.setdefault(metric, []).append(value)
    return {metric: sum(values) / len(values) for metric, values in found.items()}


def group_counts(rows: Rows) -> dict[str, int]:
    """How many groups there are, and how many of them the metrics are of."""
    groups = [right for _, right in _groups(rows).values()]
    relevant = [right for right in groups if max(right) > 0]
    return {"groups": len(groups), "ranked": len(relevant), "with_both": sum(min(right) <= 0 for right in relevant)}


def _groups(rows: Rows) -> dict[Any, tuple[list[float], list[float]]]:
    groups: dict[Any, tuple[list[float], list[float]]] = {}
    for row in rows:
        said, right = groups.setdefault(row["group"], ([], []))
        said.append(-math.inf if row["said"] is None else row["said"])
        right.append(row["right"])
    return groups


@lru_cache(maxsize=2**14)  # a bootstrap draws the same groups again and again
def _group_scores(said: tuple[float, ...], right: tuple[float, ...], k: int) -> dict[str, float]:
    if max(right) <= 0:
        return {}
    order = sorted(zip(said, right, strict=True), key=lambda item: -item[0])
    tied = [[gain for _, gain in block] for _, block in groupby(order, key=lambda item: item[0])]
    ideal = sum(gain * _discount(place, k) for place, gain in enumerate(sorted(right, reverse=True)))
    gained, missed, reciprocal, above, place = 0.0, 1.0, 0.0, 0.0, 0
    others_seen, relevant_seen = 0, 0
    for gains in tied:
        size, relevant = len(gains), sum(gain > 0 for gain in gains)
        gained += sum(gains) / size * sum(_discount(place + i, k) for i in range(size))
        if relevant and not relevant_seen:
            # Chance that the first relevant of the block is its i-th item.
            chances = [math.comb(size - i, relevant - 1) / math.comb(size, relevant) for i in range(1, size + 1)]
            reciprocal = sum(chance / (place + i) for i, chance in enumerate(chances, 1))
            missed = 1 - sum(chances[: max(k - place, 0)])
        above += (size - relevant) * (relevant_seen + relevant / 2)
        place, relevant_seen, others_seen = place + size, relevant_seen + relevant, others_seen + size - relevant
    scores = {f"ndcg@{k}": gained / ideal, f"hit_rate@{k}": min(1 - missed, 1.0), "mrr": reciprocal}
    return scores | ({"auroc": above / (relevant_seen * others_seen)} if others_seen else {})


def _discount(place: int, k: int) -> float:
    """Of the item at a place, from 0."""
    return 1 / math.log2(place + 2) if place < k else 0.0
