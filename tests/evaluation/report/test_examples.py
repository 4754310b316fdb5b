"""Predictions that are shown, and their media."""

import base64
import io
from pathlib import Path

import PIL.Image

from finetune.data.media import decode
from finetune.data.predictions import Prediction
from finetune.data.sample import Medium
from finetune.evaluation.report.examples import Album, examples
from finetune.recipe.schema import Limits


def prediction(tuned, target, good, row="a:1") -> Prediction:
    return Prediction("t", row, (), "", target, {"tuned": tuned}, good)


def test_an_answer_is_marked_by_whether_it_is_right():
    def verdict(**row):
        (example,) = examples([prediction(**row)], Album(Limits()))
        return example.verdict

    sure = {"label": "猫", "probabilities": {"猫": 0.9, "狗": 0.1}}
    assert (
        verdict(tuned=sure, target="猫", good=1.0) == "right" and verdict(tuned=sure, target="狗", good=0.0) == "wrong"
    )
    assert verdict(tuned="a long cat", target="a cat", good=0.8) == ""
    assert verdict(tuned=3.2, target=4, good=-0.8) == "" and verdict(tuned=None, target="a", good=0.0) == "wrong"


def test_a_video_is_shown_by_its_first_frame():
    path = min((Path(__file__).parents[3] / "recipes" / "data" / "clips" / "videos").iterdir())
    shown = Album(Limits()).embed(Medium("video", path))
    with PIL.Image.open(io.BytesIO(base64.b64decode(shown.uri.partition(",")[2]))) as opened:
        first = decode("video", path).frames[0].resize(opened.size).convert("L").tobytes()
        difference = [abs(a - b) for a, b in zip(opened.convert("L").tobytes(), first, strict=True)]
    assert sum(difference) / len(difference) < 6


def test_ties_are_broken_by_how_sure_it_was_and_both_sides_are_apart():
    def row(number, good, sure):
        tuned = {"label": "a", "probabilities": {"a": sure, "b": 1 - sure}}
        return prediction(tuned, "a" if good else "b", good, f"r:{number}")

    rows = [row(number, float(number % 2), 0.5 + number / 200) for number in range(90)]
    found = examples([*rows, prediction("a", "a", None, "r:x")], Album(Limits()))
    worst, best = ([example.row for example in found if example.side == side] for side in ("worst", "best"))
    assert worst == [f"r:{number}" for number in range(88, 48, -2)]
    assert best == [f"r:{number}" for number in range(89, 49, -2)]
    few = examples(rows[:5], Album(Limits()))
    assert len(few) == 5 == len({example.row for example in few})


def test_right_and_wrong_answers_are_counted():
    rows = [prediction("a", "a", 1.0, f"r:{number}") for number in range(30)] + [prediction("b", "a", 0.0, "r:x")]
    found = examples(rows, Album(Limits()))
    assert {(example.side, example.group) for example in found} == {
        ("worst", "wrong answers, 1 of 31"),
        ("best", "right answers, 30 of 31"),
    }
    between = examples([prediction("a b", "a", 0.7), prediction("b", "a", 0.0)], Album(Limits()))
    assert [example.group for example in between] == ["worst answers", "best answers"]


def test_boxes_stand_where_they_are_in_thousandths():
    right, wrong = {"label": "cat", "box": [100, 200, 500, 1000]}, {"label": "dog", "box": [0, 0, 250, 10]}
    (example,) = examples([prediction([wrong], [right], 0.0)], Album(Limits()))
    assert [(box.kind, box.left, box.top, box.width, box.height) for box in example.boxes] == [
        ("target", 10.0, 20.0, 40.0, 80.0),
        ("tuned", 0.0, 0.0, 25.0, 1.0),
    ]
    assert example.target == "cat (100, 200, 500, 1000)"
    for other in (None, "a", ["a"], [{"box": "a"}], [{"box": [1, 2]}], {"label": "a"}):
        assert not examples([prediction(other, other, 0.0)], Album(Limits()))[0].boxes
