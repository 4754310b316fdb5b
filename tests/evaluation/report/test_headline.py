"""What a run comes to, in sentences that the rows bear out."""

import json
from dataclasses import asdict, replace

import pytest
from html_page import Page
from trained_runs import change_json, copy_of

from finetune.data.predictions import Prediction
from finetune.data.sample import Medium
from finetune.evaluation.report.content import Content
from finetune.evaluation.report.headline import figures, headlines, verdict_of
from finetune.evaluation.report.report import report
from finetune.evaluation.results import Comparison, Metrics, OtherRows
from finetune.evaluation.uncertainty import mcnemar, share_interval


def test_a_verdict_needs_a_difference_whose_interval_excludes_zero():
    assert verdict_of(Comparison(0.2, 0.1, 0.3), lower=False) == "yes"
    assert verdict_of(Comparison(0.2, -0.1, 0.3), lower=False) == "unclear"
    assert verdict_of(Comparison(-0.2, -0.3, 0.1), lower=False) == "no"
    assert verdict_of(Comparison(0.0, 0.0, 0.0), lower=False) == "no"
    assert verdict_of(Comparison(-0.2, -0.3, -0.1), lower=False) == "worse"
    assert verdict_of(Comparison(-0.2, -0.3, -0.1), lower=True) == "yes"
    assert verdict_of(Comparison(0.2, 0.1, 0.3), lower=True) == "worse"
    assert verdict_of(Comparison(-0.2), lower=True) == "unclear" and verdict_of(Comparison(0.2), lower=True) == "no"


def content_of(metric, scores, compared, rows, medium="image", interval=None, target="a") -> Content:
    """A run with one task whose main metric this is."""
    media = (Medium(medium, "a.png"),)
    predictions = [Prediction("t", f"r:{number}", media, "?", target, {}, None) for number in range(rows)]
    metrics = Metrics(
        scores={"t": {metric: scores}},
        intervals={"t": {metric: {"tuned": interval}}} if interval else {},
        comparisons={"t": {metric: {name: asdict(one) for name, one in compared.items()}}},
        scored_rows={"t": rows},
    )
    return Content("run", None, metrics, predictions, {}, {}, None, {}, {}, [], [])


def test_a_run_of_labels_in_a_sentence():
    scores = {"tuned": 142 / 226, "base": 27 / 226, "blank": 70 / 226}
    compared = {"base": mcnemar(120, 5, 226), "blank": mcnemar(80, 8, 226)}
    (found,) = headlines(content_of("accuracy", scores, compared, 226, interval=share_interval(142, 226)))
    assert found.sentence == (
        "On 226 held-out rows the trained model answers 63% right (95% CI 56–69%); the untrained one 12%. "
        "With blank pictures it falls to 31%, so it does use them."
    )
    training, media = found.conclusions
    assert (training.question, training.verdict) == ("Did training help?", "yes")
    ((reason, numbers),) = training.reasons
    assert reason == "63% against 12% before training"
    assert numbers.startswith("+50.9 points, 95% CI +42.") and numbers.endswith("; rows: 120 gained, 5 lost; p < 0.001")
    assert (media.question, media.verdict) == ("Does it use the pictures?", "yes")


@pytest.mark.parametrize(
    ("right", "untrained", "rows", "says"),
    [
        (3, 0, 3, ", a difference that may be chance"),
        (8, 2, 13, ""),
        (0, 0, 3, ", so nothing shows that training helped"),
    ],
)
def test_chance_is_named_where_it_may_be_chance(right, untrained, rows, says):
    scores = {"tuned": right / rows, "base": untrained / rows}
    compared = {"base": mcnemar(right - untrained, 0, rows)}
    (found,) = headlines(content_of("accuracy", scores, compared, rows))
    assert found.sentence.endswith(f"; the untrained one {untrained / rows:.0%}{says}.")


def test_few_groups_are_no_rows_that_score_alike():
    compared = {"base": Comparison(0.2, gained=3, lost=1, groups=4)}
    (found,) = headlines(content_of("mrr", {"tuned": 0.667, "base": 0.467}, compared, 40, "image"))
    assert "is 0.667 (too few groups for a CI); the untrained one's is 0.467" in found.sentence
    assert found.conclusions[0].reasons[0][1] == "+0.200, too few groups for a CI; groups: 3 gained, 1 lost"


def test_error_rates_are_better_when_lower():
    scores = {"tuned": 0.008, "base": 1.302, "blank": 0.652}
    compared = {"base": Comparison(-1.294, -1.5, -1.1, 190, 0), "blank": Comparison(-0.644, -0.8, -0.5, 180, 1)}
    (found,) = headlines(content_of("word_error_rate", scores, compared, 192, "audio", (0.003, 0.015)))
    assert found.sentence == (
        "On 192 held-out rows the trained model's word error rate is 0.8% (95% CI 0.3–1.5%; lower is better); the "
        "untrained one's is 130%. With blank recordings it rises to 65%, so it does use them."
    )
    assert [one.verdict for one in found.conclusions] == ["yes", "yes"]
    assert (
        figures("word_error_rate", compared["base"])
        == "−129.4 points, 95% CI −150.0 to −110.0; rows: 190 gained, 0 lost"
    )


def test_too_few_rows_are_named():
    compared = {"base": Comparison(0.3, None, None, 4, 1)}
    (found,) = headlines(content_of("iou", {"tuned": 0.5, "base": 0.2}, compared, 5))
    assert "the trained model's IoU is 0.500 (too few rows for a CI)" in found.sentence
    assert found.conclusions[0].verdict == "unclear"
    assert found.conclusions[0].reasons[0][1] == "+0.300, too few rows for a CI; rows: 4 gained, 1 lost"


def test_few_rows_of_which_nearly_all_gained_leave_no_doubt():
    scores = {"tuned": 0.014, "base": 1.6, "blank": 1.1}
    compared = {name: Comparison(0.014 - scores[name], gained=11, lost=0, p=0.001) for name in ("base", "blank")}
    content = content_of("word_error_rate", scores, compared, 12, "audio")
    other = content.metrics.model_copy(update={"data": OtherRows(path="/rows/neu.csv")})
    (found,) = headlines(replace(content, metrics=other))
    assert found.sentence == (
        "On 12 rows of neu.csv the trained model's word error rate is 1.4% (too few rows for a CI; lower is better); "
        "the untrained one's is 160%. With blank recordings it rises to 110%, so it does use them."
    )
    assert verdict_of(Comparison(1.6, gained=0, lost=11, p=0.001), lower=True) == "worse"
    assert verdict_of(Comparison(-1.6, gained=0, lost=11, p=0.001), lower=True) == "unclear"  # one row outweighs them
    assert verdict_of(Comparison(-1.6, gained=3, lost=0, p=0.25), lower=True) == "unclear"


def test_several_right_answers_arent_answered_right_or_wrong():
    (found,) = headlines(content_of("accuracy", {"tuned": 0.5}, {}, 30, target=["a", "b"]))
    assert "the trained model's accuracy is 50%" in found.sentence


def test_an_answer_that_needs_no_picture_is_recognised(finished_run, tmp_path):
    run = copy_of(finished_run("plain"), tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    for values in metrics["scores"]["classify"].values():
        values["blank"] = values["shuffled"] = values["tuned"]
    for compared in metrics["comparisons"]["classify"].values():
        compared["blank"] = compared["shuffled"] = asdict(mcnemar(0, 0, 4))
    change_json(run / "metrics.json", scores=metrics["scores"], comparisons=metrics["comparisons"])
    page = Page(report(run))
    assert "Does it use the pictures? No evidence :" in page.text and "nothing shows that it uses them." in page.text
