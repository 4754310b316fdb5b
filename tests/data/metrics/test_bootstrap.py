import numpy as np
import pytest
from scipy import stats

from finetune.evaluation.bootstrap import intervals


def mean(rows):
    return {"mean": float(np.mean([row["x"] for row in rows]))}


def rows_of(values, group=None):
    return [{"x": float(value)} | ({"group": group(i)} if group else {}) for i, value in enumerate(values)]


def test_intervals_are_those_of_scipy():
    values = np.random.default_rng(0).exponential(size=200)
    low, high = intervals(rows_of(values), mean, seed=1, resamples=4000)["mean"]
    other = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=2).confidence_interval
    assert (low, high) == pytest.approx((other.low, other.high), abs=0.02)
    narrow = intervals(rows_of(values), mean, seed=1, resamples=2000, level=0.5)["mean"]
    assert low < narrow[0] < narrow[1] < high


def covered(draw, trials: int) -> float:
    """Share of data sets of mean 0 whose 90% interval holds 0."""
    held = 0
    for trial in range(trials):
        rows = draw(np.random.default_rng(trial))
        low, high = intervals(rows, mean, seed=trial, resamples=200, level=0.9)["mean"]
        held += low <= 0 <= high
    return held / trials


def test_intervals_hold_the_truth_as_often_as_they_say():
    assert covered(lambda generator: rows_of(generator.normal(size=60)), 150) == pytest.approx(0.9, abs=0.07)


def test_rows_of_a_group_are_drawn_together():
    """Rows that are the same within a group tell no more than one of them does."""

    def grouped(generator, with_groups=True):
        values = np.repeat(generator.normal(size=25), 8)
        return rows_of(values, (lambda i: f"user {i // 8}") if with_groups else None)

    assert covered(grouped, 100) == pytest.approx(0.9, abs=0.1)
    assert covered(lambda generator: grouped(generator, with_groups=False), 100) < 0.6


def test_a_group_drawn_twice_counts_as_two():
    rows = [{"group": name, "x": x} for name in "abcd" for x in (0, 1, 2)]
    seen = []

    def score(drawn):
        sizes: dict = {}
        for row in drawn:
            sizes[row["group"]] = sizes.get(row["group"], 0) + 1
        seen.append(sizes)
        return {"groups": float(len(sizes))}

    assert intervals(rows, score, seed=0, resamples=20) == {"groups": (4.0, 4.0)}
    assert all(set(sizes.values()) == {3} for sizes in seen)
    assert [row["group"] for row in rows] == [name for name in "abcd" for _ in range(3)]


def test_the_seed_decides_and_too_few_rows_tell_nothing():
    rows = rows_of(range(10))
    assert intervals(rows, mean, seed=3) == intervals(rows, mean, seed=3) != intervals(rows, mean, seed=4)
    assert intervals(rows[:1], mean, seed=3) == intervals([], mean, seed=3) == {}
    assert intervals(rows_of(range(10), lambda i: "one"), mean, seed=3) == {}


def test_a_metric_that_most_draws_lack_has_no_interval():
    rows = rows_of([0] * 19 + [1])

    def score(drawn):
        found = sum(row["x"] for row in drawn)
        return {"always": 1.0} | ({"often": 1.0} if found else {}) | ({"seldom": 1.0} if found > 2 else {})

    assert intervals(rows, score, seed=0).keys() == {"always", "often"}  # 1 - 0.95 ** 20 = 0.64 of draws
