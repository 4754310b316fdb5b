"""Proposals and decisions, with a stand-in for the model and for the page's library."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import part, tiny_encoder, tiny_picture, tiny_recipe

import finetune
from finetune.commands import data_label
from finetune.common.errors import DataError, RecipeError
from finetune.data.sample import Answer
from finetune.model import load as loading
from finetune.model.bindings import TaskBinding
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Limits


class Model:
    """Says what a picture is called, as often as it is asked."""

    def __init__(self, **tasks: Any) -> None:
        self.model = SimpleNamespace(
            bindings={name: TaskBinding(task=task, head=part("heads", "language")) for name, task in tasks.items()}
        )
        self.asked: list[str] = []
        self.encoders, self.limits = {"image": tiny_encoder()}, Limits()

    def ask(self, name, conversations, *, max_new_tokens, view=None):
        said = self.answers(conversations, max_new_tokens=max_new_tokens)
        return [Answer(text, {text: 0.75, "other": 0.25}) for text in said]

    def answers(self, conversations, *, max_new_tokens, view=None):
        names = [part.path.stem for messages in conversations for part in messages[-1].content if hasattr(part, "path")]
        assert len(names) == len(conversations)
        self.asked += names
        return names


@pytest.fixture
def rows(tmp_path):
    for name in ("cat", "dog", "ox"):
        tiny_picture().save(tmp_path / f"{name}.png")
    path = tmp_path / "rows.csv"
    path.write_text("image,label\ncat.png,\ndog.png,hound\nox.png,\n")
    return path


def with_model(monkeypatch, model):
    monkeypatch.setattr(loading, "load", lambda folder: model)
    return model


def read(path: Path) -> list[dict]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_without_a_model_nothing_is_proposed(rows, tmp_path):
    result = finetune.data_label(rows, out=tmp_path / "labels.csv")
    saved = read(result.out)
    assert list(saved[0]) == ["row", "media", "text", "proposed", "confidence", "label"]
    assert [(row["row"], row["proposed"], row["label"]) for row in saved] == [
        ("rows.csv:2", "", ""),
        ("rows.csv:3", "", "hound"),
        ("rows.csv:4", "", ""),
    ]
    assert (result.rows, result.proposed, result.labelled) == (3, 0, 1)


def test_lines_within_a_text_do_not_break_the_file(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b'text,label\r\n"one\rtwo",\r\n"three\nfour",\r\n')
    for _ in range(2):  # the second goes on with the first's file
        saved = read(finetune.data_label(tmp_path / "rows.csv", out=tmp_path / "labels.csv").out)
        assert [row["text"].splitlines()[1] for row in saved] == ["two", "four"]


def test_a_model_proposes_once_for_what_has_no_label(rows, tmp_path, monkeypatch):
    model = with_model(monkeypatch, Model(classify=part("tasks", "classify")))
    out = tmp_path / "labels.csv"
    finetune.data_label(rows, "run", out=out, batch=1)
    assert model.asked == ["cat", "ox"]
    saved = read(out)
    assert [(row["proposed"], row["confidence"]) for row in saved] == [("cat", "0.750"), ("", ""), ("ox", "0.750")]
    assert saved[0]["text"] == "What is this?"
    out.write_text(out.read_text(encoding="utf-8-sig").replace("ox,0.750,", "ox,0.750,bull"), encoding="utf-8")
    result = finetune.data_label(rows, "run", out=out)
    assert model.asked == ["cat", "ox"] and result.labelled == 2 and read(out)[2]["label"] == "bull"


def test_a_medium_that_can_not_be_decoded_is_passed_over(rows, tmp_path, monkeypatch, capsys):
    (tmp_path / "cat.png").write_bytes(b"no picture")
    model = with_model(monkeypatch, Model(classify=part("tasks", "classify")))
    result = finetune.data_label(rows, "run", out=tmp_path / "labels.csv")
    assert model.asked == ["ox"] and result.proposed == 1 and read(result.out)[0]["proposed"] == ""
    told = capsys.readouterr().err
    assert "1 row without a proposal" in told and "cat.png: not a picture" in told


def test_a_file_is_read_with_the_columns_and_encoding_of_the_runs_recipe(rows, tmp_path, monkeypatch):
    recipe = load_recipe(tiny_recipe(tmp_path / "project"))
    source = recipe.data[0].model_copy(update={"columns": {"image": "照片", "label": "label"}})
    (tmp_path / "run").mkdir()
    recipe.model_copy(update={"data": [source, recipe.data[1]]}).save(tmp_path / "run" / "recipe.yaml")
    rows.write_text(rows.read_text().replace("image", "照片").replace(",", ";"), encoding="utf-16")
    model = with_model(monkeypatch, Model(classify=part("tasks", "classify")))
    finetune.data_label(rows, tmp_path / "run", out=tmp_path / "labels.csv")
    assert model.asked == ["cat", "ox"]


def test_an_interrupted_round_of_proposals_goes_on(rows, tmp_path, monkeypatch):
    model = with_model(monkeypatch, Model(classify=part("tasks", "classify")))
    answers, out = model.answers, tmp_path / "labels.csv"

    def breaks(conversations, *, max_new_tokens, view=None):
        if model.asked:
            raise KeyboardInterrupt
        return answers(conversations, max_new_tokens=max_new_tokens)

    model.answers = breaks
    with pytest.raises(KeyboardInterrupt):
        finetune.data_label(rows, "run", out=out, batch=1)
    assert [row["proposed"] for row in read(out)] == ["cat", "", ""]
    model.answers = answers
    finetune.data_label(rows, "run", out=out, batch=1)
    assert model.asked == ["cat", "ox"]


def test_a_recipe_asks_as_its_task_does(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path)
    data = tmp_path / "data" / "test.csv"
    data.write_text(data.read_text().replace("test0.png,red", "test0.png,"))
    model = with_model(monkeypatch, Model())
    result = finetune.data_label(recipe, "run", out=tmp_path / "labels.csv")
    assert result.rows == 20 and result.labelled == 19 and model.asked == ["test0"]


def test_several_tasks_must_be_told_apart(rows, tmp_path, monkeypatch):
    with_model(monkeypatch, Model(shelf=part("tasks", "classify"), colour=part("tasks", "classify", prompt="Colour?")))
    with pytest.raises(RecipeError, match="shelf, colour: name one with task="):
        finetune.data_label(rows, "run", out=tmp_path / "labels.csv")
    finetune.data_label(rows, "run", out=tmp_path / "labels.csv", task="colour")
    assert read(tmp_path / "labels.csv")[0]["text"] == "Colour?"


def test_a_file_of_something_else_is_not_overwritten(rows, tmp_path):
    with pytest.raises(DataError, match="not a file of labels"):
        finetune.data_label(rows, out=rows)
    out = tmp_path / "labels.csv"
    finetune.data_label(rows, out=out)
    rows.write_text("image,label\ndog.png,\n")
    with pytest.raises(DataError, match="aren't among these"):
        finetune.data_label(rows, out=out)


@pytest.fixture
def labelling(rows, tmp_path):
    task = part("tasks", "classify", labels=("cat", "hound"))
    return data_label.read_rows_to_label(rows, tmp_path / "out" / "labels.csv", None, task, ())


def test_each_decision_is_on_disk_and_the_next_row_without_a_label_comes(labelling):
    assert labelling.labels == ["cat", "hound"] and labelling.open_from(0) == 0
    assert labelling.decide(0, "cat") == 2  # row 1 has its label
    assert [row["label"] for row in read(labelling.path)] == ["cat", "hound", ""]
    assert labelling.decide(2, " 牛 ") == 0 and labelling.done == 3 and labelling.labels[-1] == "牛"
    assert labelling.decide(1, "") == 1  # taken back
    assert [row["label"] for row in read(labelling.path)] == ["cat", "", "牛"]
    assert not list(labelling.path.parent.glob("*.partial"))


def test_media_are_shown_and_what_can_not_be_decoded_is_told(labelling, rows):
    assert "data:image/jpeg;base64," in data_label.media_html(labelling.items[0], Limits())
    (rows.parent / "cat.png").write_bytes(b"<script>")
    told = data_label.media_html(labelling.items[0], Limits())
    assert "not a picture" in told and "<script>" not in told


def test_the_page_without_gradio_says_how_to_get_it(rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(RecipeError, match=r"pip install 'finetune-kit\[label\]'"):
        finetune.data_label(rows, out=tmp_path / "labels.csv", page_port=7860)


class Page:
    """Takes down what a page is made of: {name of a button: what it calls}."""

    def __init__(self) -> None:
        self.calls: dict[str, Any] = {}

    def __getattr__(self, kind):
        def make(value="", *_, **__):
            element = SimpleNamespace(
                click=lambda call, *_: self.calls.__setitem__(value, call),
                submit=lambda call, *_: self.calls.__setitem__("submit", call),
                input=lambda call, *_: self.calls.__setitem__("choice", call),
                load=lambda call, *_: self.calls.__setitem__("load", call),
            )
            return Context(element)

        return make


class Context:
    def __init__(self, element):
        self.element = element

    def __getattr__(self, name):
        return getattr(self.element, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_the_buttons_of_the_page_decide(labelling):
    page = Page()
    data_label.build_page(page, labelling)
    assert {"cat", "hound", "Skip", "Back", "load"} <= page.calls.keys()
    number, head, media, text, _said, field = page.calls["load"]()
    assert number == 0 and "1 of 3" in head and "<img" in media and text == "What is this?" and field == ""
    number, head, *_ = page.calls["cat"](0)
    assert number == 2 and "2 of 3" in head and read(labelling.path)[0]["label"] == "cat"
    assert page.calls["Back"](2)[0] == 1 and page.calls["Skip"](2)[0] == 0
    page.calls["Save the written label"]("ox", 2)
    assert read(labelling.path)[2]["label"] == "ox"
