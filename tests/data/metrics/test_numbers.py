import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import mean_absolute_error, root_mean_squared_error

from finetune.data.metrics.numbers import correlation, number_in, number_scores


@pytest.mark.parametrize(
    "text, number",
    [
        *[
            ("4.5", 4.5),
            ("4.5 stars", 4.5),
            ("评分：4。", 4.0),
            ("４．５分", 4.5),
            ("1,250", 1250.0),
            ("$1,234,567.89.", 1234567.89),
        ],
        *[("−3", -3.0), (".5", 0.5), ("85%", 85.0), ("1e3", 1000.0), ("0", 0.0)],
        *[
            ("", None),
            ("four", None),
            ("四", None),
            ("4 out of 5", None),
            ("1,2", None),
            ("3-4", None),
            ("1,2345", None),
        ],
        *[("9" * 400, None), ("nan", None), ("inf", None)],
    ],
)
def test_a_text_holds_one_number_or_none(text, number):
    assert number_in(text) == number


def rows_of(said, right):
    return [{"predicted": one, "right": other} for one, other in zip(said, right, strict=True)]


def test_scores_are_those_of_sklearn_and_scipy():
    generator = np.random.default_rng(0)
    right = generator.integers(1, 6, 100).astype(float)
    said = right + generator.normal(size=100).round(1)
    scores = number_scores(rows_of(said, right), None, None)
    assert scores["mean_absolute_error"] == pytest.approx(mean_absolute_error(right, said))
    assert scores["root_mean_squared_error"] == pytest.approx(root_mean_squared_error(right, said))
    assert scores["spearman"] == pytest.approx(stats.spearmanr(said, right).statistic)
    assert scores["pearson"] == pytest.approx(stats.pearsonr(said, right).statistic)
    assert scores["readable"] == 1.0


def test_an_answer_without_a_number_errs_as_far_as_can_be():
    rows = rows_of([None, 4.0, 1.0], [2.0, 4.0, 3.0])
    scores = number_scores(rows, 1.0, 5.0)
    assert scores["mean_absolute_error"] == pytest.approx((3 + 0 + 2) / 3) and scores["readable"] == pytest.approx(
        2 / 3
    )
    assert number_scores(rows, None, None)["mean_absolute_error"] == pytest.approx((2 + 0 + 2) / 3)
    assert scores["pearson"] == pytest.approx(stats.pearsonr([2.5, 4.0, 1.0], [2.0, 4.0, 3.0]).statistic)
    nothing = number_scores(rows_of([None, None], [2.0, 4.0]), None, None)
    assert nothing == {
        "mean_absolute_error": 2.0,
        "root_mean_squared_error": 2.0,
        "readable": 0.0,
        "spearman": 0.0,
        "pearson": 0.0,
    }


def test_what_is_always_the_same_has_no_order():
    same = number_scores(rows_of([3.0, 3.0], [1.0, 2.0]), None, None)
    assert same["spearman"] == same["pearson"] == 0.0
    assert number_scores(rows_of([1.0, 2.0], [3.0, 3.0]), None, None).keys() == {
        "mean_absolute_error",
        "root_mean_squared_error",
        "readable",
    }
    tiny = np.array([1e-200, 2e-200, 4e-200])
    assert correlation(tiny, np.array([1e200, 2e200, 3e200])) == pytest.approx(0.98198, abs=1e-4)
