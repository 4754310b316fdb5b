"""Alignment without labels: given the media, the LLM says what it would say to their text."""

import json

import pytest
import torch
from test_model import features_of, shake
from tiny import FUSIONS, PLACEHOLDER, tiny_composite, tiny_recipe
from torch.nn import functional

import finetune
from finetune.adapter import attach, set_trainable
from finetune.data.collate import Collator
from finetune.errors import DataError


def pair(placeholders: int) -> list[dict]:
    """Two samples, each with a picture for the pupil, and with four words in its place for the teacher."""
    samples = []
    for number, answer in enumerate(([7, 8, 9], [30, 31])):
        seen = [5, *[PLACEHOLDER] * placeholders, 6]
        read = [5, 50, 51, 52, 53 + number, 6]
        samples.append(
            {
                "input_ids": seen + answer,
                "labels": [-100] * len(seen) + answer,
                "media_kinds": ["image"],
                "media_keys": [str(number)],
                "teacher_input_ids": read + answer,
                "teacher_labels": [-100] * len(read) + answer,
            }
        )
    return samples


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_loss_is_the_divergence_from_what_the_bare_llm_says_to_the_text(fusion, packed):
    model = tiny_composite(fusion=fusion)
    attach(model, rank=2, alpha=4, dropout=0.5)
    shake(model)
    set_trainable(model, ["projectors"])
    samples = pair(4 if fusion == "prefix" else 1)
    batch = Collator(samples, features_of, field="features", packed=packed)([{"samples": [0, 1]}])
    model.eval()
    outputs = model(**batch, temperature=3.0)
    expected, same = 0.0, 0
    for number, sample in enumerate(samples):  # each alone, its answer's positions picked by hand
        length = sum(label != -100 for label in sample["labels"])
        with torch.no_grad():
            picture = {"image": [features_of("image", str(number))]}
            given = model(torch.tensor([sample["input_ids"]]), features=picture).logits[0, -length - 1 : -1]
            with model.language_model.disable_adapter():
                wanted = model(torch.tensor([sample["teacher_input_ids"]])).logits[0, -length - 1 : -1]
        theirs = (wanted / 3).softmax(-1)
        expected += (theirs * (theirs.log() - functional.log_softmax(given / 3, -1))).sum().item()
        same += (given.argmax(-1) == wanted.argmax(-1)).sum().item()
    assert outputs["loss"].item() == pytest.approx(expected, rel=1e-4) and outputs["agreement"] == same
    outputs["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.projectors.parameters())


def test_a_pupil_that_reads_the_text_itself_has_nothing_to_learn():
    model = tiny_composite()
    samples = [
        {**sample, "input_ids": sample["teacher_input_ids"], "labels": sample["teacher_labels"]} for sample in pair(4)
    ]
    for sample in samples:
        sample["media_kinds"] = sample["media_keys"] = []
    batch = Collator(samples, features_of, field="features")([{"samples": [0, 1]}])
    outputs = model(**batch)
    assert outputs["loss"].item() == pytest.approx(0, abs=1e-5) and outputs["agreement"] == 5


def distilling(folder, answers: str, transcript: str = "label"):
    stage = {"name": "listen", "trains": ["projectors"], "learning_rate": 1.0e-2, "epochs": 25}
    stage["distill"] = {"answers": answers, "max_new_tokens": 3}
    task = {"kind": "classify", "transcript": transcript}
    data = [
        {"path": str(folder / "data" / f"{split}.csv"), "task": task, "split": split} for split in ("train", "test")
    ]
    return finetune.load_recipe(tiny_recipe(folder, train__stages=[stage], data=data))


@pytest.mark.parametrize("answers", ["own", "given"])
def test_a_stage_that_distills_comes_nearer_to_the_llm_that_reads(answers, tmp_path):
    run = finetune.train(distilling(tmp_path, answers), tmp_path / "run")
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
    recipe = distilling(tmp_path, "own", transcript="")
    expected = r"(?s)'listen' distills, which needs the media's text.*train.csv:2: train0.png has no"
    with pytest.raises(DataError, match=expected):
        finetune.train(recipe, tmp_path / "run")
