from itertools import permutations
from statistics import fmean

import numpy as np
import pytest
from sklearn.metrics import ndcg_score, roc_auc_score

from finetune.data.metrics.ranking import group_counts, ranking_scores


def rows_of(groups):
    return [
        {"group": f"g{number}", "predicted": one, "right": float(other)}
        for number, (said, right) in enumerate(groups)
        for one, other in zip(said, right, strict=True)
    ]


def drawn(levels: int, groups: int = 20):
    """Groups of 2 to 8 items, their numbers of so few `levels` that many are equal; relevance 0 to 3."""
    generator = np.random.default_rng(levels)
    found = []
    for size in generator.integers(2, 9, groups):
        right = generator.integers(0, 4, size) * generator.integers(0, 2, size)
        found.append((generator.integers(0, levels, size).astype(float).tolist(), right.tolist()))
    return found


@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_scores_are_those_of_sklearn(levels, k):
    groups = drawn(levels)
    scores = ranking_scores(rows_of(groups), k)
    relevant = [(said, right) for said, right in groups if max(right) > 0]
    assert len(relevant) < len(groups)
    assert scores[f"ndcg@{k}"] == pytest.approx(fmean(ndcg_score([right], [said], k=k) for said, right in relevant))
    both = [(said, np.array(right) > 0) for said, right in relevant if min(right) == 0]
    assert scores["auroc"] == pytest.approx(fmean(roc_auc_score(right, said) for said, right in both))
    assert group_counts(rows_of(groups)) == {"groups": 20, "ranked": len(relevant), "with_both": len(both)}


@pytest.mark.parametrize("k", [1, 2, 4])
def test_ties_are_the_mean_over_all_orders_that_they_leave_open(k):
    for said, right in drawn(2, groups=8):
        if len(said) > 6 or max(right) == 0:
            continue
        orders = [order for order in permutations(range(len(said))) if sorted(said)[::-1] == [said[i] for i in order]]
        firsts = [next(place for place, i in enumerate(order, 1) if right[i] > 0) for order in orders]
        scores = ranking_scores(rows_of([(said, right)]), k)
        assert scores["mrr"] == pytest.approx(fmean(1 / first for first in firsts))
        assert scores[f"hit_rate@{k}"] == pytest.approx(fmean(first <= k for first in firsts))


def test_by_hand():
    groups = [([0.9, 0.5, 0.1], [0, 1, 0]), ([0.2, 0.8], [0, 1]), ([0.4, 0.6], [0, 0])]
    scores = ranking_scores(rows_of(groups), 1)
    assert scores == {"ndcg@1": 0.5, "hit_rate@1": 0.5, "mrr": 0.75, "auroc": 0.75}


def test_items_without_a_number_come_last_and_groups_without_a_relevant_item_are_left_out():
    rows = rows_of([([None, 0.1, None], [1, 0, 0])])
    assert ranking_scores(rows, 3)["mrr"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert ranking_scores(rows, 3)["auroc"] == pytest.approx(0.25)
    assert ranking_scores(rows_of([([1.0, 2.0], [0, 0])]), 3) == {}
    assert ranking_scores(rows_of([([1.0, 2.0], [1, 2])]), 3).keys() == {"ndcg@3", "hit_rate@3", "mrr"}
