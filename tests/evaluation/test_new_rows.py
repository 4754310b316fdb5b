"""Rows that a recipe doesn't name are scored as those that it names are."""

import csv
import json
from pathlib import Path

import pytest
from cli import cli
from tiny import part
from trained_runs import copy_of, file_digests, predictions_of

import finetune
from finetune.common.errors import DataError, RecipeError
from finetune.data.new_files import RowsAs, file_like
from finetune.data.rows import read_samples
from finetune.evaluation.new_rows import NewRows
from finetune.recipe.schema import Source


@pytest.fixture
def run(finished_run, tmp_path):
    return copy_of(finished_run("heads"), tmp_path, "checkpoints", "merged")


def renamed_copy(source: Path, to: Path, **columns: str) -> Path:
    """The rows of a table with other column names."""
    with source.open(newline="") as file:
        rows = list(csv.reader(file))
    with to.open("w", newline="") as file:
        csv.writer(file).writerows([[columns.get(name, name) for name in rows[0]], *rows[1:]])
    return to


def test_columns_that_are_named_leave_those_of_the_recipe(tmp_path):
    known = Source(
        path=tmp_path / "train.csv", task=part("tasks", "classify"), columns={"image": "scan", "label": "Dx"}
    )
    path = tmp_path / "new.csv"
    path.write_text("scan,dx\n1.png,a\n")
    assert file_like(known, path, RowsAs({"label": "dx"})).columns == {"image": "scan", "label": "dx"}


def test_the_recipes_own_rows_get_the_same_scores_beside_the_runs(run, finished_run, tmp_path):
    """The held-out rows under other names of their columns; what the run holds stays as it is."""
    rows = finished_run("heads").parent / "rows"
    table = renamed_copy(rows / "colour-test.csv", tmp_path / "again.csv", image="photo", label="class")
    before = file_digests(run)
    options = ["--task", "colour", "--columns", "image=photo", "--columns", "label=class", "--media-folder", rows]
    done = cli("evaluate", run, "--data", table, *options)
    assert done.returncode == 0, done.stderr
    assert "colour, n = 8" in done.stdout and "training rows" not in done.stdout
    folder = run / "evaluations" / "again"
    assert done.stdout.strip().endswith(str(folder))
    metrics, own = (json.loads((place / "metrics.json").read_text()) for place in (folder, run))
    assert metrics["scores"].keys() == {"colour"} and metrics["data"]["path"] == str(table)
    for condition in ("tuned", "base", "blank", "probe"):  # media are shuffled among those of other tasks too
        for metric, values in own["scores"]["colour"].items():
            assert metrics["scores"]["colour"][metric][condition] == values[condition], (metric, condition)
    mine, theirs = predictions_of(folder), [row for row in predictions_of(run) if row["task"] == "colour"]
    for row, other in zip(mine, theirs, strict=True):
        assert {**row, "row": "", "shuffled": None} == {**other, "row": "", "shuffled": None}
    after = file_digests(run)
    assert {name: after[name] for name in before} == before


def test_rows_that_were_trained_on_are_counted(run, finished_run):
    rows = finished_run("heads").parent / "rows" / "mark-train.csv"
    done = cli("evaluate", run, "--data", rows, "--task", "mark", "--out", run / "evaluations" / "seen")
    assert done.returncode == 0, done.stderr
    assert "mark, n = 24" in done.stdout and "24 of these rows are also training rows" in done.stdout
    with pytest.raises(DataError, match="holds the scores of other rows"):
        finetune.evaluate(run, rows.with_name("mark-test.csv"), task="mark", out=run / "evaluations" / "seen")


def test_what_can_not_be_meant_is_refused_before_the_model_is_loaded(run, finished_run, tmp_path):
    rows = finished_run("heads").parent / "rows" / "mark-test.csv"
    with pytest.raises(RecipeError, match="colour, likely, mark, order, words: name one with task="):
        finetune.evaluate(run, rows)
    with pytest.raises(RecipeError, match="task=colours: the model was trained for colour"):
        finetune.evaluate(run, rows, task="colours")
    with pytest.raises(RecipeError, match="no such file"):
        finetune.evaluate(run, tmp_path / "none.csv", task="mark")
    with pytest.raises(DataError, match="is a run's folder"):
        finetune.evaluate(run, rows, task="mark", out=run)
    with pytest.raises(DataError, match="8 of 8 rows can't be used"):
        finetune.evaluate(run, rows, task="mark", columns={"mark": "text"})
    (tmp_path / "deep").mkdir()
    away = renamed_copy(rows, tmp_path / "deep" / "away.csv")
    with pytest.raises(
        DataError,
        match=r"(?s)no such image: .*or name the folder of their media with media_folder=",
    ):
        finetune.evaluate(run, away, task="mark")
    other = renamed_copy(rows, tmp_path / "other.csv", image="images")
    done = cli("evaluate", run, "--data", other, "--task", "mark", "--media-folder", rows.parent)
    assert done.returncode == 2 and done.stderr.strip().endswith("say which it is with --columns image=images")
    done = cli("evaluate", run, "--task", "mark")
    assert done.returncode == 2 and "name them with --data" in done.stderr
    assert not (run / "evaluations").exists()


def test_rows_in_another_encoding_than_the_recipes_are_read(run, finished_run, tmp_path):
    """Those in UTF-16, and those whose encoding is named."""
    recipe = finetune.load_recipe(run / "recipe.yaml")
    text = (finished_run("heads").parent / "rows" / "words-test.csv").read_text().replace("square", "carré")
    for name, written, named in (("a", "utf-16", None), ("b", "cp1252", "cp1252")):
        (tmp_path / f"{name}.csv").write_text(text.replace(",", ";"), encoding=written)
        new = NewRows.of(recipe, tmp_path / f"{name}.csv", "words", RowsAs(encoding=named))
        assert all("carré" in sample.messages[0].content[0] for sample in new.samples(recipe.media))


@pytest.mark.parametrize("option", [{"task": "x"}, {"columns": {"a": "b"}}, {"encoding": "big5"}, {"out": "here"}])
def test_options_of_rows_without_rows_are_refused(option, tmp_path):
    with pytest.raises(RecipeError, match=r"task=, columns=, .* are about other rows: name them with data="):
        finetune.evaluate(tmp_path, **option)
    done = cli("evaluate", tmp_path, "--task", "x")
    assert done.returncode == 2 and "name them with --data" in done.stderr


def with_label(tmp_path: Path, text: str) -> Source:
    """A source of the label Movement, and rows for it in rows.csv."""
    (tmp_path / "rows.csv").write_text(text)
    task = {"kind": "classify", "text": "Text", "label": "Movement", "media": []}
    return Source(path=tmp_path / "known.csv", format={"kind": "table"}, columns={"Text": "Words"}, task=task)


def test_a_column_is_named_as_the_task_or_as_the_recipe_does(tmp_path):
    source = with_label(tmp_path, "Words,Direction\na,up\nb,down\n")
    for name in ("label", "Movement"):
        read = read_samples(file_like(source, tmp_path / "rows.csv", RowsAs({name: "Direction"})), 10**6)
        assert [sample.answer for sample, _ in read] == ["up", "down"]


def test_every_column_that_is_missing_gets_its_option(tmp_path):
    source = with_label(tmp_path, "Said,Direction\na,up\n")
    with pytest.raises(DataError, match=r"say which they are with columns=\{'Movement': '...', 'Text': '...'\}"):
        read_samples(file_like(source, tmp_path / "rows.csv", RowsAs()), 10**6)
