from pathlib import Path

import pytest
from task_rows import Asked

from finetune.common.errors import DataError
from finetune.data.sample import Answer, Row
from finetune.data.tasks._columns import number_from, number_of
from finetune.data.tasks.score import Options, written


def test_a_number_is_written_learned_and_read(tmp_path):
    asked = Asked("score", tmp_path, minimum=1, maximum=5, digits=1)
    for value, answer in (("4.5", "4.5"), (4, "4"), ("3.00", "3"), ("4.25", "4.2")):
        sample = asked.sample(score=value)
        assert sample.answer == answer and sample.target == float(value)
    assert asked.read("评分：4.5分") == 4.5 and asked.read("no") is None and asked.read("9") == 5.0
    assert asked.read("3", number=0.2) == 1.0 and asked.read("3", number=float("nan")) is None


def test_good_is_the_share_of_the_range_that_is_not_missed(tmp_path):
    asked = Asked("score", tmp_path, minimum=1, maximum=5)
    sample = asked.sample(score=2)
    assert [asked.row(sample, Answer(text))["good"] for text in ("2", "3", "5", "x")] == [1.0, 0.75, 0.25, 0.0]
    scores = asked.scores((sample, "3"), (sample, "x"))
    assert scores["mean_absolute_error"] == 2.0 and scores["readable"] == 0.5
    free = Asked("score", tmp_path)
    assert [free.row(sample, Answer(text))["good"] for text in ("2", "3", "x")] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("value", ["", None, "four", "nan", "inf", "6", 0, "1,500", [3]])
def test_what_is_no_number_within_the_bounds_is_refused(tmp_path, value):
    with pytest.raises(DataError, match=r"rows\.csv:2: column 'score'"):
        Asked("score", tmp_path, minimum=1, maximum=5).sample(score=value)


def test_bounds_are_in_order():
    with pytest.raises(ValueError, match="minimum"):
        Options(minimum=5, maximum=1)


def test_no_more_digits_than_there_are():
    assert [written(number, 2) for number in (0.0, -0.001, 10.0, 0.126, -2.5, 1e6)] == [
        *("0", "0", "10", "0.13", "-2.5", "1000000")
    ]
    assert written(10.0, 0) == "10" and written(2.5, 0) == "2"


@pytest.mark.parametrize(
    ("text", "number"), [("99,00", 99), ("1.234,50", 1234.5), ("-0,125", -0.125), ("1234,567", 1234.567), ("4.5", 4.5)]
)
def test_numbers_with_a_decimal_comma(text, number):
    assert number_from(text) == number


def test_a_comma_that_may_be_either_is_refused():
    assert number_from("1,234") is None and number_from("1,2,3") is None and number_from("nan") is None
    row = Row(Path("rows.csv"), 2, {"score": "1,234"}, Path("."))
    with pytest.raises(DataError, match=r"holds '1,234'; write a number, like 1234 or 1\.234"):
        number_of(row, "score")
