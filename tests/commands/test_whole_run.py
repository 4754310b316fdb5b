"""`finetune run` to its end: scores before a merge that is refused, and a typical question."""

import pytest
from cli import cli
from tiny import tiny_recipe

from finetune.commands.run import typical
from finetune.data.predictions import Prediction

TUNE = [{"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 5.0e-3}]


def test_scores_are_printed_and_reported_though_the_merge_is_refused(tmp_path):
    recipe = tiny_recipe(tmp_path, merge={"rows": 4, "max_kl": 1e-30, "dtype": "bfloat16"}, train__stages=TUNE)
    done = cli("run", recipe, "--run", tmp_path / "run")
    assert done.returncode == 3
    warning, training = done.stderr.index("warning: only 4 rows to score"), done.stderr.index("tune: trains")
    assert warning < training
    assert "classify, n = 4" in done.stdout and "accuracy" in done.stdout
    assert "merge.max_kl is 1e-30" in done.stderr and "report.html says this too" in done.stderr
    page = (tmp_path / "run/report.html").read_text()
    assert "The merge was refused" in page and "merge.max_kl is 1e-30" in page and "Not merged yet" not in page
    again = cli("merge", tmp_path / "run")
    assert again.returncode == 3


@pytest.mark.slow
def test_a_question_a_picture_both_answers_and_all_paths(tmp_path):
    """The question is asked by the command line in a process of its own."""
    done = cli("run", tiny_recipe(tmp_path, train__stages=TUNE), "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "merged" / "config.json").is_file()
    lines = done.stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("image "))
    assert [line.split()[0] for line in lines[start : start + 4]] == ["image", "question", "answer", "right"]
    assert lines[start].endswith(".png") and lines[start + 1].endswith("What is this?")
    assert lines[start - 1] == "" and any(line.startswith("report ") for line in lines)
    assert "Merged into the 16-bit LLM" in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize(
    ("good", "row"), [([0, 1, 1], 1), ([0, 1, 0], 0), ([1, 0], 0), ([0.2, 0.9, 0.5], 2), ([None, None], 0)]
)
def test_the_question_is_about_a_row_that_is_neither_best_nor_worst(good, row):
    rows = [Prediction("a", str(number), (), "?", "x", {}, value) for number, value in enumerate(good)]
    assert typical([*rows, Prediction("b", "other", (), "?", "x", {}, 1)]).row == str(row)
