from itertools import combinations
from statistics import fmean

import pytest

from finetune.data.metrics.answers import commonest, normalised, vqa_accuracy


@pytest.mark.parametrize(
    "answer, expected",
    [
        # What the official script makes of them.
        *[("The Red, one.", "red 1"), ("a dog", "dog"), ("3.5", "3.5"), ("1,000 dogs", "1000 dogs"), ("none", "0")],
        *[("red/blue", "red blue"), ("black - white", "black  white"), ("yes!", "yes"), ("new\nyork", "new york")],
        *[("Ten.", "10"), ("2:30", "2:30"), ("t-shirt", "t shirt")],
        # Ours: apostrophes go, an article may be all there is, and Chinese is left as it is but for its punctuation.
        *[
            ("don't", "dont"),
            ("dont", "dont"),
            ("A", "a"),
            ("两只猫。", "两只猫"),
            ("红色，蓝色", "红色蓝色"),
            ("", ""),
        ],
    ],
)
def test_answers_are_normalised(answer, expected):
    assert normalised(answer) == " ".join(expected.split())


def test_accuracy_of_ten_answers_is_the_mean_over_leaving_one_out():
    """As published: the mean over the ten subsets of nine of min(those who agree / 3, 1)."""
    for agree in range(11):
        answers = ["x"] * agree + ["y"] * (10 - agree)
        expected = fmean(min(subset.count("x") / 3, 1) for subset in combinations(answers, 9))
        assert vqa_accuracy("x", answers) == pytest.approx(expected)
    assert [vqa_accuracy("x", ["x"] * n + ["y"] * (10 - n)) for n in (1, 2, 3, 4)] == pytest.approx(
        [0.3, 0.6, 0.9, 1.0]
    )


def test_accuracy_of_few_answers_is_the_share_that_agrees():
    assert vqa_accuracy("x", ["x"]) == vqa_accuracy("x", ["x"] * 3) == vqa_accuracy("x", ["x"] * 4) == 1.0
    assert vqa_accuracy("x", ["x", "y"]) == 0.5 and vqa_accuracy("x", ["x", "y", "z"]) == pytest.approx(1 / 3)
    assert vqa_accuracy("z", ["x", "y"]) == 0.0


def test_the_commonest_answer_is_as_it_was_first_written():
    assert commonest(["Two", "cats", "2", "two."]) == "Two" and commonest(["红", "蓝"]) == "红"
