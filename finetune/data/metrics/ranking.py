"""Orders of the items of a group against their relevance. scikit-learn and torchmetrics break ties by position, or
average them only for NDCG; here each metric is the exact mean over all orders of ties, cached per group for resampling.
"""

import math
from functools import lru_cache
from itertools import groupby

from finetune.data.metrics import Rows


def ranking_scores(rows: Rows, k: int) -> dict[str, float]:
    """Means over groups, of rows with "group", "predicted" (a number, or None: below all) and "right" (relevance, 0 for
    none): ndcg@k (linear gains, as in sklearn's ndcg_score), hit_rate@k, mrr; auroc over groups with both relevant and
    other items.

    Items with equal numbers come in any order: each metric is its mean over all these orders. Groups without a relevant
    item can't be ranked well or badly: they are left out, and counted by `group_counts`.
    """
    scores: dict[str, list[float]] = {}
    for predicted, right in _groups(rows).values():
        for metric, value in _group_scores(tuple(predicted), tuple(right), k).items():
            scores.setdefault(metric, []).append(value)
    return {metric: sum(values) / len(values) for metric, values in scores.items()}


def group_counts(rows: Rows) -> dict[str, int]:
    """How many groups there are, are scored, and have an auroc."""
    groups = [right for _, right in _groups(rows).values()]
    relevant = [right for right in groups if max(right) > 0]
    return {"groups": len(groups), "ranked": len(relevant), "with_both": sum(min(right) <= 0 for right in relevant)}


def _groups(rows: Rows) -> dict[object, tuple[list[float], list[float]]]:
    groups: dict[object, tuple[list[float], list[float]]] = {}
    for row in rows:
        predicted, right = groups.setdefault(row["group"], ([], []))
        predicted.append(-math.inf if row["predicted"] is None else row["predicted"])
        right.append(row["right"])
    return groups


@lru_cache(maxsize=2**14)  # a bootstrap draws the same groups again and again
def _group_scores(predicted: tuple[float, ...], right: tuple[float, ...], k: int) -> dict[str, float]:
    if max(right) <= 0:
        return {}
    order = sorted(zip(predicted, right, strict=True), key=lambda item: -item[0])
    tied = [[gain for _, gain in block] for _, block in groupby(order, key=lambda item: item[0])]
    ideal = sum(gain * _discount(place, k) for place, gain in enumerate(sorted(right, reverse=True)))
    gained, missed, reciprocal, above, place = 0.0, 1.0, 0.0, 0.0, 0
    other_above, relevant_above = 0, 0
    for gains in tied:
        size, relevant = len(gains), sum(gain > 0 for gain in gains)
        gained += sum(gains) / size * sum(_discount(place + i, k) for i in range(size))
        if relevant and not relevant_above:
            # The probability that the block's first relevant item is its i-th.
            probabilities = [math.comb(size - i, relevant - 1) / math.comb(size, relevant) for i in range(1, size + 1)]
            reciprocal = sum(p / (place + i) for i, p in enumerate(probabilities, 1))
            missed = 1 - sum(probabilities[: max(k - place, 0)])
        above += (size - relevant) * (relevant_above + relevant / 2)
        place, relevant_above, other_above = place + size, relevant_above + relevant, other_above + size - relevant
    scores = {f"ndcg@{k}": gained / ideal, f"hit_rate@{k}": min(1 - missed, 1.0), "mrr": reciprocal}
    return scores | ({"auroc": above / (relevant_above * other_above)} if other_above else {})


def _discount(place: int, k: int) -> float:
    """Weight of the item at a place, counted from 0."""
    return 1 / math.log2(place + 2) if place < k else 0.0
