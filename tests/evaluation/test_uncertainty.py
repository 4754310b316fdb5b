"""Intervals and paired comparisons, against closed forms, scipy, and how often they hold the truth."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from finetune.data.metrics import share_interval
from finetune.data.metrics.ranking import ranking_scores
from finetune.evaluation import uncertainty
from finetune.evaluation.uncertainty import FEWEST, ScoredRows, compare, mcnemar


def mean(rows):
    return {"mean": float(np.mean([row["x"] for row in rows]))}


def rows_of(values, group=None):
    return [
        {"x": float(value), "good": float(value)} | ({"group": group(i)} if group else {})
        for i, value in enumerate(values)
    ]


def interval(values, group=None, *, seed=1):
    return ScoredRows(rows_of(values, group), mean, seed).interval("mean")


def compared(ours, theirs, group=None):
    return compare(*(ScoredRows(rows_of(values, group), mean, 1) for values in (ours, theirs)), "mean")


def wilson(right, rows):
    return tuple(stats.binomtest(right, rows).proportion_ci(method="wilson"))


@pytest.mark.parametrize(("right", "rows"), [(0, 3), (3, 3), (2, 13), (8, 13), (142, 226)])
def test_a_share_of_right_rows_has_wilsons_interval(right, rows):
    expected = pytest.approx(wilson(right, rows), abs=1e-9)
    assert share_interval(right, rows) == expected
    assert interval([1] * right + [0] * (rows - right)) == expected
    assert 0.4 < wilson(3, 3)[0] < 0.5  # three of three is no proof


def exact_p(gained, lost):
    """Two tails of a fair coin, by hand."""
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(max(gained, lost), changed + 1)) / 2**changed
    return min(1.0, 2 * tail)


@pytest.mark.parametrize(
    ("gained", "lost", "rows"), [(3, 0, 3), (0, 0, 3), (6, 0, 13), (7, 1, 13), (1, 7, 13), (5, 5, 20)]
)
def test_right_and_wrong_rows_are_compared_by_mcnemars_exact_test(gained, lost, rows):
    ours = [1] * gained + [0] * lost + [1] * (rows - gained - lost)
    theirs = [0] * gained + [1] * lost + [1] * (rows - gained - lost)
    found = compared(ours, theirs)
    assert (found.gained, found.lost, found.p) == (gained, lost, pytest.approx(exact_p(gained, lost)))
    assert found.difference == pytest.approx((gained - lost) / rows) and found.low <= found.difference <= found.high


def test_eight_of_thirteen_against_two_of_the_same_is_certain():
    """0.615 against 0.154: Wilson's intervals overlap, the rows that changed don't leave a doubt."""
    assert share_interval(8, 13)[0] < share_interval(2, 13)[1]
    found = compared([1] * 8 + [0] * 5, [1] * 2 + [0] * 11)
    assert (found.gained, found.lost, found.p) == (6, 0, 2 * 0.5**6) and found.low > 0
    # If all that changed changed one way, the upper end is that of the share of changed rows: Clopper and Pearson's.
    assert found.high == pytest.approx(stats.binomtest(6, 13).proportion_ci(0.95).high, abs=1e-4)


def test_three_of_three_against_none_is_not_certain():
    found = mcnemar(3, 0, 3)
    assert (found.difference, found.p, found.high) == (1.0, 0.25, 1.0)
    assert found.low == pytest.approx(2 * 0.025 ** (1 / 3) - 1, abs=1e-3)
    none = mcnemar(0, 0, 3)
    assert none.p == 1 and (none.low, none.high) == pytest.approx(
        (0.025 ** (1 / 3) - 1, 1 - 0.025 ** (1 / 3)), abs=1e-3
    )


def test_the_interval_of_a_difference_holds_it_and_agrees_with_the_test():
    rows = 13
    tables = [(gained, lost) for gained, lost in itertools.product(range(rows + 1), repeat=2) if gained + lost <= rows]
    found = {table: mcnemar(*table, rows) for table in tables}
    for table, one in found.items():
        assert (one.low > 0 or one.high < 0) == (exact_p(*table) < 0.05), table
    for gain, loss in [(0.1, 0.1), (0.5, 0.1), (0.7, 0.02), (0.05, 0.4)]:
        held = sum(
            stats.multinomial.pmf([*table, rows - sum(table)], rows, [gain, loss, 1 - gain - loss])
            for table, one in found.items()
            if one.low - 1e-9 <= gain - loss <= one.high + 1e-9
        )
        assert held >= 0.95, (gain, loss)


def test_other_scores_have_scipys_bootstrap_interval(monkeypatch):
    monkeypatch.setattr(uncertainty, "RESAMPLES", 4000)
    values = np.random.default_rng(0).exponential(size=200)
    other = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=2).confidence_interval
    low, high = interval(values)
    assert (low, high) == pytest.approx((other.low, other.high), abs=0.02)
    monkeypatch.setattr(uncertainty, "LEVEL", 0.5)
    narrow = interval(values)
    assert low < narrow[0] < narrow[1] < high


def test_a_difference_of_other_scores_has_scipys_paired_bootstrap_interval(monkeypatch):
    monkeypatch.setattr(uncertainty, "RESAMPLES", 4000)
    generator = np.random.default_rng(0)
    theirs = generator.exponential(size=100)
    ours = theirs + generator.normal(0.1, 0.2, size=100)  # far apart only as pairs
    found = compared(ours, theirs)
    other = stats.bootstrap(
        (ours, theirs),
        lambda left, right, axis: np.mean(left, axis=axis) - np.mean(right, axis=axis),
        paired=True, method="percentile", n_resamples=4000, rng=2,
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=0.006)
    assert found.low > 0 and found.p is None
    assert (found.gained, found.lost) == (int((ours > theirs).sum()), int((ours < theirs).sum()))
    assert interval(ours)[0] < interval(theirs)[1]


def test_too_few_rows_and_equal_rows_have_no_bootstrap_interval():
    values = np.random.default_rng(0).uniform(size=FEWEST)
    assert interval(values) and not interval(values[1:])
    assert interval(np.full(50, 0.7)) is None  # a perfect or constant score is no certainty
    assert interval(values, lambda i: f"user {i // 2}") is None
    few = compared(values[1:], values[1:] / 2)
    assert (few.low, few.high) == (None, None) and few.difference > 0


def test_too_few_rows_for_an_interval_are_compared_by_a_sign_test():
    """In groups these are compared, since their rows aren't independent."""
    ours, theirs = np.full(12, 0.9), np.linspace(0, 0.9, 12)
    found = compared(ours, theirs)
    assert (found.low, found.gained, found.lost, found.p) == (None, 11, 0, pytest.approx(exact_p(11, 0)))
    assert compared(ours, theirs, lambda i: f"user {i // 2}").p == pytest.approx(exact_p(6, 0))


def test_an_error_rate_of_zero_or_one_isnt_a_share_of_right_rows():
    """Its rows could also have been worse than 1."""
    rows = ScoredRows(rows_of([0] * 3), lambda drawn: {"word_error_rate": mean(drawn)["mean"]}, seed=0)
    assert rows.values == {"word_error_rate": 0.0} and rows.interval("word_error_rate") is None


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(uncertainty, "RESAMPLES", 200)
    monkeypatch.setattr(uncertainty, "LEVEL", 0.9)


def test_groups_are_compared_by_their_scores_not_by_the_numbers_that_order_them():
    """The second model's numbers are lower by 100, its orders the same but in group 2."""
    right = [1, 0, 0, 1, 1, 0]
    ours, theirs = [9, 1, 2, 8, 7, 3], [-91, -99, -98, -92, -97, -93]

    def scored(numbers):
        rows = [{"good": n, "group": i // 2 + 1, "predicted": n, "right": right[i]} for i, n in enumerate(numbers)]
        return ScoredRows(rows, lambda some: ranking_scores(some, 2), 1)

    found = compare(scored(ours), scored(theirs), "mrr")
    assert (found.gained, found.lost, found.groups) == (1, 0, 3)


def covered(draw, trials: int, **grouped) -> float:
    """Share of data sets of mean 0 whose 90% interval holds 0."""
    held = 0
    for trial in range(trials):
        values = draw(np.random.default_rng(trial))
        low, high = interval(values, **grouped, seed=trial)
        held += low <= 0 <= high
    return held / trials


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say(quick):
    assert covered(lambda generator: generator.normal(size=60), 150) == pytest.approx(0.9, abs=0.07)


@pytest.mark.slow
def test_rows_of_a_group_are_drawn_together(quick):
    """Rows that are the same within a group tell no more than one of them does."""

    def repeated(generator):
        return np.repeat(generator.normal(size=25), 8)

    assert covered(repeated, 100, group=lambda i: f"user {i // 8}") == pytest.approx(0.9, abs=0.1)
    assert covered(repeated, 100) < 0.6
    # Right and wrong rows of groups aren't independent either.
    values = [i % 2 for i in range(25) for _ in range(8)]
    low, high = interval(values, lambda i: f"user {i // 8}")
    alone_low, alone_high = interval(values)
    assert high - low > 2 * (alone_high - alone_low)


def test_a_group_drawn_twice_counts_as_two():
    rows = [{"group": f"user {number}", "x": x} for number in range(FEWEST) for x in (0, 1, 2)]
    seen = []

    def score(drawn):
        sizes: dict = {}
        for row in drawn:
            sizes[row["group"]] = sizes.get(row["group"], 0) + 1
        seen.append(sizes)
        return {"groups": float(len(sizes))}

    assert set(ScoredRows(rows, score, 0).resampled["groups"]) == {FEWEST}
    assert all(set(sizes.values()) == {3} for sizes in seen)
    assert [row["group"] for row in rows] == [f"user {number}" for number in range(FEWEST) for _ in range(3)]


def test_the_seed_decides():
    values = np.random.default_rng(0).uniform(size=40)
    assert interval(values, seed=3) == interval(values, seed=3) != interval(values, seed=4)


def test_a_metric_that_most_samples_lack_has_no_interval():
    def score(drawn):
        found, value = sum(row["x"] for row in drawn), mean(drawn)["mean"]
        return {"often": value} | ({"seldom": value} if found == 2 else {})

    scored = ScoredRows(rows_of([0] * 18 + [1, 1]), score, seed=0)
    assert scored.values.keys() == {"often", "seldom"}
    assert scored.interval("often") and not scored.interval("seldom")  # 0.29 of samples
