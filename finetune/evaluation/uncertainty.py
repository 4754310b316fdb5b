"""How certain a score is: 95% confidence intervals, and paired comparisons of two conditions on the same rows.

Where each row is right or wrong, intervals are Wilson's (1927), and two conditions are compared by McNemar's exact test
(1947) with the interval of Fay and Lumbard (2021, https://doi.org/10.1002/sim.8829), which excludes 0 exactly if p is
below 0.05. Other scores are resampled (percentile bootstrap, Efron 1979): rows are drawn with replacement, groups
whole, and the same ones for both conditions. Of too few rows or groups for that, those that are better under one
condition are compared with those that are worse (sign test).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from finetune.data.metrics import lower_is_better, share_interval
from finetune.evaluation.results import Comparison

Measure = Mapping[str, Any]  # what a task's `measure` gives for a row
Score = Callable[[list[Any]], dict[str, float]]
Interval = tuple[float, float]

LEVEL = 0.95
RESAMPLES = 1000
FEWEST = 20  # rows or groups; of fewer, bootstrap intervals are far too narrow (Hesterberg 2015, arXiv 1411.5279)
GRID = (np.arange(400) + 0.5) / 400  # probabilities at which distributions are tabulated


class ScoredRows:
    """The scores of some rows under one condition. `values`: metric -> value; `right`: metric -> booleans (N,), for
    those that are the share of right rows; `of_groups`: the scores of each group; `resampled`: metric -> values (R,) of
    RESAMPLES samples of as many rows, NaN where a sample has none.

    Rows with the same non-empty "group" are drawn together, and as a new group each time. With the same seed, other
    conditions of the same rows are resampled alike.
    """

    def __init__(self, rows: Sequence[Measure], score: Score, seed: int) -> None:
        self.values = score(list(rows)) if rows else {}
        self.good = np.array([float(row.get("good", np.nan)) for row in rows])
        units = _units(rows)
        self.units = len(units)
        grouped = any(row.get("group") for row in rows)
        self.of_groups = [score(unit) for unit in units] if grouped else []
        self.right = {} if grouped else _right(rows, score)
        self.resampled = {metric: np.full(RESAMPLES, np.nan) for metric in self.values}
        generator = np.random.default_rng(seed)
        for number in range(RESAMPLES if self.units >= FEWEST else 0):
            drawn = generator.integers(self.units, size=self.units).tolist()
            if grouped:
                sample = [{**row, "group": copy} for copy, unit in enumerate(drawn, 1) for row in units[unit]]
            else:
                sample = [units[unit][0] for unit in drawn]
            for metric, value in score(sample).items():
                if metric in self.resampled:
                    self.resampled[metric][number] = value

    def interval(self, metric: str) -> Interval | None:
        """None where a bootstrap can't tell: of fewer than FEWEST rows or groups, if all samples score the same, or if
        fewer than half of them have the metric.
        """
        if metric in self.right:
            return share_interval(int(self.right[metric].sum()), len(self.right[metric]))
        ends = _middle(self.resampled[metric])
        return None if ends is None or ends[0] == ends[1] else ends


def compare(ours: ScoredRows, theirs: ScoredRows, metric: str) -> Comparison:
    """Our score minus theirs, on the same rows in the same order."""
    if metric in ours.right and metric in theirs.right:
        left, right = ours.right[metric], theirs.right[metric]
        return mcnemar(int((left & ~right).sum()), int((right & ~left).sum()), len(left))
    good, other = ours.good, theirs.good
    if ours.of_groups:  # the numbers by which one model orders a group's rows are none of another's
        good, other = (np.array([one.get(metric, np.nan) for one in s.of_groups]) for s in (ours, theirs))
    ends = _middle(ours.resampled[metric] - theirs.resampled[metric])
    gained, lost = int((good > other).sum()), int((good < other).sum())
    return Comparison(
        difference=ours.values[metric] - theirs.values[metric],
        low=ends[0] if ends else None,
        high=ends[1] if ends else None,
        gained=gained,
        lost=lost,
        p=None if ends else _sign_test(gained, lost),
        groups=len(ours.of_groups),
    )


def compare_rows(ours: Sequence[float], theirs: Sequence[float], seed: int) -> Comparison:
    """The mean of our numbers, one a row, minus that of theirs."""

    def mean(rows: list[Measure]) -> dict[str, float]:
        return {"mean": float(np.mean([row["good"] for row in rows]))}

    def scored(numbers: Sequence[float]) -> ScoredRows:
        return ScoredRows([{"good": number} for number in numbers], mean, seed)

    return compare(scored(ours), scored(theirs), "mean")


def mcnemar(gained: int, lost: int, rows: int) -> Comparison:
    """The difference of two shares of right rows, if `gained` rows are right only with ours and `lost` only with
    theirs; p is two-sided.
    """
    changed = gained + lost
    low, high = _difference_interval(gained, changed, rows)
    return Comparison(
        difference=(gained - lost) / rows,
        low=low,
        high=high,
        gained=gained,
        lost=lost,
        p=_sign_test(gained, lost),
    )


def _sign_test(gained: int, lost: int) -> float:
    """Two-sided p; McNemar's, where rows are right or wrong."""
    changed = gained + lost
    return float(stats.binomtest(gained, changed).pvalue) if changed else 1.0


def _difference_interval(gained: int, changed: int, rows: int) -> Interval:
    """Fay and Lumbard's: the exact (Clopper-Pearson) confidence distributions of the share of rows that changed, and of
    those among them that were gained, multiplied.
    """
    least, most = _beta(changed, rows - changed + 1), _beta(changed + 1, rows - changed)
    worst = 2 * _beta(gained, changed - gained + 1) - 1
    best = 2 * _beta(gained + 1, changed - gained) - 1
    tail = (1 - LEVEL) / 2
    low = min(np.quantile(np.multiply.outer(share, worst), tail, method="hazen") for share in (least, most))
    high = max(np.quantile(np.multiply.outer(share, best), 1 - tail, method="hazen") for share in (least, most))
    return float(low), float(high)


def _beta(left: int, right: int) -> np.ndarray:
    """Quantiles of a beta distribution at GRID; if a parameter is 0, the point 0 or 1 that is all of it."""
    if left == 0 or right == 0:
        return np.full(1, float(right == 0))
    quantiles: np.ndarray = stats.beta.ppf(GRID, left, right)
    return quantiles


def _middle(values: np.ndarray) -> Interval | None:
    """The quantiles between which the middle LEVEL of the values lies; None if fewer than half are known."""
    known = values[~np.isnan(values)]
    if 2 * len(known) < len(values) or not len(known):
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _right(rows: Sequence[Measure], score: Score) -> dict[str, np.ndarray]:
    """Metric -> booleans (N,): the metrics of which each row alone has 0 or 1, and any rows together the mean."""
    each = [score([row]) for row in rows]
    samples = [range(begin, len(rows), step) for begin, step in ((0, 1), (0, 2), (1, 2), (0, 3))]
    means = [(list(sample), score([rows[i] for i in sample])) for sample in samples if sample]
    result = {}
    for metric in each[0] if each else ():
        own = np.array([one.get(metric, np.nan) for one in each])
        means_too = (np.isclose(own[sample].mean(), scores.get(metric, np.nan)) for sample, scores in means)
        if not lower_is_better(metric) and np.isin(own, (0, 1)).all() and all(means_too):
            result[metric] = own == 1
    return result


def _units(rows: Sequence[Measure]) -> list[list[Measure]]:
    """What is drawn at once: a row, or the rows of a group."""
    units: dict[object, list[Measure]] = {}
    for number, row in enumerate(rows):
        units.setdefault(("group", row["group"]) if row.get("group") else number, []).append(row)
    return list(units.values())
