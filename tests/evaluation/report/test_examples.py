"""Predictions that are shown, and their media."""

import base64
import io

import PIL.Image
from finished_run import DATA, rows_of

from finetune.data.media import Limits, decode
from finetune.evaluation.report.examples import Album, examples
from finetune.evaluation.results import Prediction


def test_an_answer_is_marked_by_whether_it_is_right():
    def verdict(**row):
        row = {"task": "t", "row": "a:1", "media": [], "kinds": [], "question": "", **row}
        (example,) = examples([Prediction.parse(row)], Album(Limits()))
        return example.verdict

    sure = {"label": "猫", "probabilities": {"猫": 0.9, "狗": 0.1}}
    assert (
        verdict(tuned=sure, target="猫", good=1.0) == "right" and verdict(tuned=sure, target="狗", good=0.0) == "wrong"
    )
    assert verdict(tuned="a long cat", target="a cat", good=0.8) == ""
    assert verdict(tuned=3.2, target=4, good=-0.8) == "" and verdict(tuned=None, target="a", good=0.0) == "wrong"


def test_a_video_is_shown_by_its_first_frame():
    path = DATA / "clips" / rows_of("clips")[0]["video"]
    shown = Album(Limits()).embed("video", str(path))
    with PIL.Image.open(io.BytesIO(base64.b64decode(shown.uri.partition(",")[2]))) as opened:
        first = decode("video", path).frames[0].resize(opened.size).convert("L").tobytes()
        difference = [abs(a - b) for a, b in zip(opened.convert("L").tobytes(), first, strict=True)]
    assert sum(difference) / len(difference) < 6


def test_ties_are_broken_by_how_sure_it_was_and_both_sides_are_apart():
    def row(number, good, sure):
        tuned = {"label": "a", "probabilities": {"a": sure, "b": 1 - sure}}
        line = {"task": "t", "row": f"r:{number}", "tuned": tuned, "target": "a" if good else "b", "good": good}
        return Prediction.parse(line)

    rows = [row(number, float(number % 2), 0.5 + number / 200) for number in range(90)]
    found = examples([*rows, Prediction.parse({"task": "t", "row": "r:x"})], Album(Limits()))
    worst, best = ([example.prediction.row for example in found if example.side == side] for side in ("worst", "best"))
    assert worst == [f"r:{number}" for number in range(88, 48, -2)]
    assert best == [f"r:{number}" for number in range(89, 49, -2)]
    few = examples(rows[:5], Album(Limits()))
    assert len(few) == 5 == len({example.prediction.row for example in few})
