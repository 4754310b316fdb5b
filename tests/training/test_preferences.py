"""Stages that learn from preferences, from rows of a file to the run folder."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from html_page import Page
from safetensors.torch import load_file
from tiny import tiny_recipe

import finetune
from finetune.common.errors import DataError, RecipeError, TrainingError
from finetune.evaluation.report.words import number
from finetune.model.features import Features
from finetune.training.reference import Reference
from finetune.training.trainer import StageTrainer

STAGE = {"name": "prefer", "trains": ["projectors", "adapter"], "learning_rate": 2e-2, "epochs": 6}


def preferring(folder: Path, objective, columns=None, **changes) -> Path:
    """A chosen and a rejected answer to a question about each picture."""
    path = tiny_recipe(folder)
    for split in ("train", "test"):
        with (folder / "data" / f"{split}.jsonl").open("w") as file:
            for number in range(8):
                row = {"image": f"images/{split}{number}.png", "question": f"What is {number}?"}
                row |= {"answer": f"a square {number}", "rejected": "no idea, sorry", "desirable": number % 3 > 0}
                file.write(json.dumps(row | (columns or {})) + "\n")
    task = {"kind": "answer"}
    data = [
        {"path": str(folder / "data" / f"{split}.jsonl"), "task": task, "split": split} for split in ("train", "test")
    ]
    stage = STAGE | {"objective": objective}
    return tiny_recipe(folder, data=data, train__stages=[stage], train__tokens_per_batch=256, **changes) or path


def stage_of(run, name="prefer"):
    return json.loads(run.metrics.read_text())["train"]["stages"][name]


@pytest.mark.parametrize("objective", ["dpo", "simpo", {"kind": "orpo", "beta": 1.0}, "ipo"])
def test_the_chosen_answer_gets_ahead(objective, tmp_path):
    run = finetune.train(preferring(tmp_path, objective), tmp_path / "run")
    figures = stage_of(run)["figures"]
    assert figures["reward_accuracy"][-1] == 1.0 and figures["reward_margin"][-1] > figures["reward_margin"][0]
    compares = "kl" in figures
    assert (run.data / "reference-prefer.safetensors").is_file() == compares
    if compares:
        assert figures["kl"][0] < 1e-9 < figures["kl"][-1]


def test_labels_part_good_answers_from_bad_ones(tmp_path):
    run = finetune.train(preferring(tmp_path, "kto"), tmp_path / "run")
    figures = stage_of(run)["figures"]
    assert len(figures["kl"]) == stage_of(run)["steps"]
    good, bad = figures["reward_desirable"], figures["reward_undesirable"]
    assert good[-1] - bad[-1] > good[0] - bad[0]


def weights_in(run):
    return load_file(run.adapter / "adapter_model.safetensors") | load_file(run.adapter / "projectors.safetensors")


def test_a_resumed_stage_reads_the_reference_that_it_began_with(tmp_path, monkeypatch):
    recipe = preferring(tmp_path, "dpo", train__save_every_n_steps=4)
    whole = finetune.train(recipe, tmp_path / "whole")
    step, calls = StageTrainer.training_step, []

    def cut(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 7:
            raise OSError("power cut")
        return step(*arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="power cut"):
        patch.setattr(StageTrainer, "training_step", cut)
        finetune.train(recipe, tmp_path / "run")
    monkeypatch.setattr(Reference, "_measured", lambda *arguments: pytest.fail("measured with changed weights"))
    reference = tmp_path / "run" / "data" / "reference-prefer.safetensors"
    kept = reference.read_bytes()
    for content in (None, kept[:-1] + bytes([kept[-1] ^ 1])):
        reference.unlink() if content is None else reference.write_bytes(content)
        with pytest.raises(TrainingError, match=r"reference-prefer\.safetensors: the reference is missing"):
            finetune.train(recipe, tmp_path / "run", resume=True)
    reference.write_bytes(kept)
    resumed = finetune.train(recipe, tmp_path / "run", resume=True)
    expected, found = weights_in(whole), weights_in(resumed)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert stage_of(resumed)["figures"] == stage_of(whole)["figures"]


def test_a_reference_is_found_again_only_where_all_that_makes_it_is_equal(tmp_path, monkeypatch):
    measured, whole = [], Reference._measured
    monkeypatch.setattr(Reference, "_measured", lambda *arguments: measured.append(1) or whole(*arguments))
    recipe = finetune.load_recipe(preferring(tmp_path, "dpo"))
    first = finetune.train(recipe, tmp_path / "one")
    again = finetune.train(recipe.with_(**{"train.stages.0.learning_rate": 1e-3}), tmp_path / "two")
    assert len(measured) == 1
    files = [run.data / "reference-prefer.safetensors" for run in (first, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    finetune.train(recipe.with_(seed=4), tmp_path / "three")  # other projectors
    assert len(measured) == 2
    text = (tmp_path / "data" / "train.jsonl").read_text()
    (tmp_path / "data" / "train.jsonl").write_text(text.replace("sorry", "alas"))
    finetune.train(recipe, tmp_path / "four")
    assert len(measured) == 3
    finetune.train(recipe.with_(**{"adapter.alpha": 7.0}), tmp_path / "five")
    assert len(measured) == 4


@pytest.mark.parametrize(
    "objective, columns, expected",
    [
        (
            "dpo",
            {"rejected": None},
            r"'prefer' has the objective 'dpo': 8 of 8 rows.*\n  train.jsonl:1: no rejected answer.*; so in 7 .* 8$",
        ),
        (
            "dpo",
            {"answer": "Red", "rejected": " Red "},
            r"train.jsonl:1: chosen and rejected are the same.*; so in 7 other rows: 2, .*, 8$",
        ),
        ("kto", {"desirable": "maybe"}, r"train.jsonl:1: no label; write true or false in a column 'desirable'; so in"),
    ],
)
def test_rows_without_a_preference_are_all_named_before_anything_is_loaded(objective, columns, expected, tmp_path):
    recipe = finetune.load_recipe(preferring(tmp_path, objective, columns))
    (tmp_path / "llm" / "model.safetensors").unlink()
    with pytest.raises(DataError, match=expected):
        finetune.train(recipe, tmp_path / "run")
    for command in (finetune.check, finetune.plan):
        with pytest.raises(DataError, match=expected):
            command(recipe)


@pytest.mark.parametrize(
    ("objective", "written", "names", "expected"),
    [
        ("dpo", {"rejected": "rejectd"}, {}, "no column 'rejected' .*'rejectd'.*`columns: {rejected: rejectd}`"),
        ("dpo", {"rejected": "worse"}, {}, "no column 'rejected' .*'worse'.*`columns: {rejected: worse}`"),
        (
            "dpo",
            {"rejected": "worse"},
            {"rejected": "wors"},
            "no column .*; columns.rejected names 'wors'; the file has 'worse'",
        ),
        ("dpo", {"answer": "choosen"}, {}, "no column 'answer' .*'choosen'.*`columns: {answer: choosen}`"),
        ("kto", {"desirable": "thumb"}, {}, "no column 'desirable' .*'thumb'.*`columns: {desirable: thumb}`"),
    ],
)
def test_a_mistyped_column_is_one_message_with_the_nearest_one(objective, written, names, expected, tmp_path):
    path = preferring(tmp_path, objective)
    recipe, rows = json.loads(path.read_text()), tmp_path / "data" / "train.jsonl"
    for ours, theirs in written.items():
        rows.write_text(rows.read_text().replace(f'"{ours}"', f'"{theirs}"'))
    if objective == "dpo":
        rows.write_text(re.sub(', "desirable": (true|false)', "", rows.read_text()))
    recipe["data"][0]["columns"] = names
    path.write_text(json.dumps(recipe))
    with pytest.raises(DataError, match=f"train.jsonl:1: here and in 7 of 7 other rows {expected}") as caught:
        finetune.check(path)
    assert str(caught.value).count("train.jsonl") == 1


def test_a_column_that_some_rows_lack_is_not_taken_for_a_mistyped_one(tmp_path):
    path = preferring(tmp_path, "dpo")
    rows = tmp_path / "data" / "train.jsonl"
    lines = [json.loads(line) | {"remark": "good"} for line in rows.read_text().splitlines()]
    for line in lines[:3]:
        del line["rejected"]
    rows.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match="3 of 8 rows can't be used") as refused:
        finetune.check(path)
    assert "remark" not in str(refused.value)


def test_a_stage_may_be_limited_to_the_sources_with_pairs(tmp_path):
    path = preferring(tmp_path, "dpo")
    recipe = json.loads(path.read_text())
    recipe["data"].append({"path": str(tmp_path / "data" / "train.csv"), "task": "classify"})
    path.write_text(json.dumps(recipe))
    with pytest.raises(DataError, match="12 of 20 rows can't be used; its `sources` may name those"):
        finetune.check(path)
    assert finetune.check(path, ["train.stages.0.sources=[0]"]).stages[0].rows == 8


def test_a_pair_that_no_row_holds_is_refused_before_the_llm_is_loaded(tmp_path):
    recipe = finetune.load_recipe(preferring(tmp_path, "dpo", {"rejected": "no idea " * 28}))
    (tmp_path / "llm" / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"(?s)8 of 8 training rows.*train.jsonl:1: the chosen and the rejected answer"):
        finetune.train(recipe, tmp_path / "run")


def test_heads_learn_nothing_from_preferences(tmp_path):
    path = preferring(tmp_path, "dpo", adapter=None)
    with pytest.raises(RecipeError, match="'adapter' can't be trained"):
        finetune.load_recipe(path)
    head = ["data.0.task=classify", "data.0.head=label", "data.1.task=classify", "data.1.head=label"]
    with pytest.raises(RecipeError, match="has the objective 'dpo', which needs the head 'language'"):
        finetune.load_recipe(preferring(tmp_path, "dpo"), [*head, "train.stages.0.trains=[heads]"])


def test_the_stage_is_planned(tmp_path):
    activations = []
    for objective in ("next_token", "dpo"):
        plan = finetune.plan(preferring(tmp_path, objective))
        phases = {phase.name: phase for phase in plan.phases}
        activations.append(phases["train prefer"].parts["activations"])
    assert activations[0] < activations[1]


def test_the_report_shows_what_the_objective_reports(tmp_path):
    run = finetune.train(preferring(tmp_path, "dpo"), tmp_path / "run")
    page = Page(finetune.report(run))
    figures = stage_of(run)["figures"]
    assert "Stage prefer, objective dpo" in page.text
    for name in ("reward accuracy", "reward margin", "kl"):
        values = figures[name.replace(" ", "_")]
        assert f"{name} {number(values[0])} {number(values[-1])}" in page.text


def test_rows_that_are_left_out_are_not_in_the_figures(tmp_path, monkeypatch):
    """A picture's features are spoiled: of its pair nothing is logged."""
    prepared, spoiled = Features.features, []

    def spoil(self, medium):
        found = prepared(self, medium)
        spoiled.append(medium.key)
        return found * float("nan") if medium.key == spoiled[0] else found

    monkeypatch.setattr(Features, "features", spoil)
    recipe = preferring(tmp_path, "simpo", train__skip_bad_rows=True)
    result = stage_of(finetune.train(recipe, tmp_path / "run"))
    assert result["left_out"] == 1
    assert all(math.isfinite(value) for values in result["figures"].values() for value in values if value is not None)
