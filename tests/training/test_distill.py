"""Alignment without labels: given the media, the LLM says what it would say to their text."""

import json
from pathlib import Path

import pytest
import torch
from packed import batch_of, features_of, shake, tokenized_sample
from tiny import FUSIONS, PLACEHOLDER, tiny_composite, tiny_recipe
from torch.nn import functional

import finetune
from finetune.common.errors import DataError, RecipeError
from finetune.data.sample import Medium, Message, Row, Sample
from finetune.data.tasks import classify
from finetune.model import composite
from finetune.model.adapter import attach
from finetune.model.imitation import Teacher
from finetune.model.trainable import set_trainable
from finetune.recipe.schema import Adapter
from finetune.training.samples import TokenizedSample

PICTURE, SOUND, SILENT = (
    Medium("image", Path("a.png"), "a cat"),
    Medium("audio", Path("b.wav"), "miau"),
    Medium("audio", Path("c.wav"), ""),
)


def pair(placeholders: int) -> list[TokenizedSample]:
    """Two samples, each with a picture for the pupil, and with four words in its place for the teacher."""
    samples = []
    for number, answer in enumerate(([7, 8, 9], [30, 31])):
        seen = [5, *[PLACEHOLDER] * placeholders, 6]
        read = [5, 50, 51, 52, 53 + number, 6]
        teacher = {"teacher_input_ids": read + answer, "teacher_labels": [-100] * len(read) + answer}
        samples.append(tokenized_sample(seen + answer, [-100] * len(seen) + answer, f"image {number}", **teacher))
    return samples


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_loss_is_the_divergence_from_what_the_bare_llm_says_to_the_text(fusion, packed):
    model = tiny_composite(fusion=fusion)
    attach(model, Adapter(rank=2, alpha=4.0, dropout=0.5))
    shake(model)
    set_trainable(model, ["projectors"])
    samples = pair(4 if fusion == "prefix" else 1)
    batch = batch_of(samples, [0, 1], packed)
    model.eval()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    outputs = model(**{**batch, "teacher": Teacher(batch["teacher"], 3.0)})
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    expected, same = 0.0, 0
    for number, sample in enumerate(samples):  # each alone, its answer's positions picked by hand
        length = sum(label != -100 for label in sample.labels)
        with torch.no_grad():
            picture = {"image": [features_of("image", str(number))]}
            given = model(torch.tensor([sample.input_ids]), features=picture).logits[0, -length - 1 : -1]
            with model.language_model.disable_adapter():
                wanted = model(torch.tensor([sample.teacher_input_ids])).logits[0, -length - 1 : -1]
        theirs = (wanted / 3).softmax(-1)
        expected += (theirs * (theirs.log() - functional.log_softmax(given / 3, -1))).sum().item()
        same += (given.argmax(-1) == wanted.argmax(-1)).sum().item()
    assert outputs["loss"].item() == pytest.approx(expected, rel=1e-4) and outputs["agreement"] == same
    outputs["loss"].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == trained


def test_a_pupil_that_reads_the_text_itself_has_nothing_to_learn():
    model = tiny_composite()
    samples = [
        tokenized_sample(
            sample.teacher_input_ids,
            sample.teacher_labels,
            teacher_input_ids=sample.teacher_input_ids,
            teacher_labels=sample.teacher_labels,
        )
        for sample in pair(4)
    ]
    batch = batch_of(samples, [0, 1])
    outputs = model(**{**batch, "teacher": Teacher(batch["teacher"], 1.0)})
    assert outputs["loss"].item() == pytest.approx(0, abs=1e-5) and outputs["agreement"] == 5


def distilling(folder, answers: str, transcript: str = "label", **changes):
    stage = {"name": "listen", "trains": ["projectors"], "learning_rate": 1.0e-2, "epochs": 25}
    stage["objective"] = {"kind": "distill", "answers": answers, "max_new_tokens": 3}
    task = {"kind": "classify", "transcript": transcript}
    data = [
        {"path": str(folder / "data" / f"{split}.csv"), "task": task, "split": split} for split in ("train", "test")
    ]
    return tiny_recipe(folder, **({"train__stages": [stage], "data": data} | changes))


def test_rows_hold_what_the_teacher_reads_too(tmp_path, monkeypatch):
    """A picture is one token under cross-attention, its caption many: rows are planned by the longer of the two."""
    stage = {"name": "listen", "trains": ["projectors", "fusion"], "learning_rate": 1.0e-2}
    stage["objective"] = {"kind": "distill", "answers": "given"}
    fusion = {"kind": "cross_attention", "every": 1, "heads": 2, "head_width": 8}
    path = distilling(tmp_path, "given", "words", model__fusion=fusion, train__stages=[stage])
    for split in ("train", "test"):
        file = tmp_path / "data" / f"{split}.csv"
        header, *rows = file.read_text().splitlines()
        file.write_text("\n".join([f"{header},words", *(f"{row},{'a red square ' * 4}" for row in rows)]) + "\n")
    widths, whole = [], composite.imitate

    def imitate(model, student, teacher):
        widths.append((student["input_ids"].shape[1], teacher.batch["input_ids"].shape[1]))
        return whole(model, student, teacher)

    monkeypatch.setattr(composite, "imitate", imitate)
    finetune.train(finetune.load_recipe(path), tmp_path / "run")
    assert all(student < teacher <= 96 for student, teacher in widths) and widths


@pytest.mark.parametrize(
    "content, expected",
    [
        (("Look:", PICTURE, "What?"), "Look:\na cat\nWhat?"),
        ((PICTURE, SOUND, "What?"), "a cat\nmiau\nWhat?"),
        ((PICTURE, SILENT, "What?"), "a cat\nWhat?"),
        (("What?", PICTURE), "What?\na cat"),
        (("One ", "two"), "One two"),
    ],
)
def test_media_in_words_stand_on_lines_of_their_own(content, expected):
    sample = Sample((Message("user", content), Message("assistant", ("So.",))), "row 1")
    assert [message.content for message in sample.in_words().messages] == [(expected,), ("So.",)]


def test_a_row_s_text_is_said_once_and_media_come_in_the_order_in_which_they_are_asked_about(tmp_path):
    for name in ("a.png", "b.wav"):
        (tmp_path / name).write_bytes(b"not opened")
    row = Row(
        tmp_path / "rows.csv", 2, {"image": "a.png", "audio": "b.wav", "label": "red", "said": "lights"}, tmp_path
    )
    options = classify.Options(media=("audio", "image"), transcript="said", prompt="Which?")
    sample = classify.sample(row, options)
    assert [(medium.kind, medium.text) for medium in sample.media] == [("image", "lights"), ("audio", "")]
    assert sample.in_words().messages[0].content == ("lights\nWhich?",)
    assert [medium.text for medium in classify.sample(row, classify.Options(media=("audio",))).media] == [None]


@pytest.mark.slow
@pytest.mark.parametrize("answers", ["own", "given"])
def test_a_stage_that_distills_comes_nearer_to_the_llm_that_reads(answers, tmp_path):
    run = finetune.train(finetune.load_recipe(distilling(tmp_path, answers)), tmp_path / "run")
    stage = json.loads(run.metrics.read_text())["train"]["stages"]["listen"]
    losses = stage["losses"]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert sum(stage["token_accuracy"][-5:]) > sum(stage["token_accuracy"][:5])
    assert set(stage["trained_weights"]) == {"projectors.image"}
    written = run.data / "answers-listen.json"
    assert written.is_file() == (answers == "own")
    if answers == "own":  # written down once, and found again by a run that goes on
        assert len(json.loads(written.read_text())["answers"]) == 12


def test_media_without_text_cannot_be_imitated(tmp_path):
    with pytest.raises(RecipeError, match=r"data\.0\.task\.transcript: stage 'listen' distills: name the column"):
        finetune.load_recipe(distilling(tmp_path, "own", transcript=""))
    chat = tmp_path / "data" / "chat.jsonl"
    content = [{"type": "image", "image": "images/train0.png"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    chat.write_text(json.dumps({"messages": turns}) + "\n")
    data = [{"path": str(chat), "task": "chat"}]
    data.append({"path": str(tmp_path / "data" / "test.csv"), "task": "classify", "split": "test"})
    recipe = finetune.load_recipe(distilling(tmp_path, "own", data=data))
    expected = r"(?s)'listen' distills: the task's `transcript` names.*chat.jsonl:1: train0.png has no"
    with pytest.raises(DataError, match=expected):
        finetune.train(recipe, tmp_path / "run")
