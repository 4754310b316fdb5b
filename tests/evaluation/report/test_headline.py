"""What a run comes to: verdicts that intervals allow."""

import json

from html_page import Page
from trained_runs import change_json, copy_of

from finetune.evaluation.report.headline import Score, compare
from finetune.evaluation.report.report import report


def test_a_verdict_needs_intervals_apart():
    ours = Score("tuned", 0.6, 0.55, 0.65)
    assert compare(ours, Score("base", 0.5, 0.45, 0.54), lower=False) == "yes"
    assert compare(ours, Score("base", 0.5, 0.45, 0.56), lower=False) == "unclear"
    assert compare(ours, Score("base", 0.6, 0.5, 0.7), lower=False) == "no"
    assert compare(ours, Score("probe", 0.54), lower=False) == "yes"
    assert compare(ours, Score("probe", 0.56), lower=False) == "unclear"
    assert compare(Score("tuned", 0.1, 0.05, 0.2), Score("base", 0.5, 0.3, 0.6), lower=True) == "yes"
    assert compare(Score("tuned", 0.1, 0.05, 0.4), Score("base", 0.5, 0.3, 0.6), lower=True) == "unclear"
    assert compare(Score("tuned", 0.7), Score("base", 0.5), lower=True) == "no"


def test_an_answer_that_needs_no_picture_is_recognised(finished_run, tmp_path):
    run = copy_of(finished_run("plain"), tmp_path)
    scores = json.loads((run / "metrics.json").read_text())["scores"]
    for values in scores["classify"].values():
        values["blank"] = values["shuffled"] = values["tuned"]
    change_json(run / "metrics.json", scores=scores)
    page = Page(report(run))
    assert "Does the answer depend on the pictures? No evidence :" in page.text
