"""Values that aren't finite: the training stops in the same step with its weights as they were, names the rows, and
goes on with one command; with `train.skip_bad_rows` it leaves such rows out.
"""

import json
from dataclasses import replace

import pytest
import torch
from cli import cli
from packed import (
    SAMPLES,
    At,
    collator_of,
    composite_with_lora,
    composite_without_dropout,
    read,
    train_composite,
    weights_of,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_recipe
from transformers import TrainerCallback

from finetune.common.errors import TrainingError
from finetune.common.run_folder import RunFolder
from finetune.model.feature_store import checksum
from finetune.training.checkpoints import newest_whole

pytestmark = pytest.mark.slow
NAMED = [sample.__class__(**vars(sample) | {"where": f"rows.csv:{n + 2}"}) for n, sample in enumerate(SAMPLES)]


def poisoned(medium):
    return read(medium) * (float("nan") if medium.key == "3" else 1.0)  # rows.csv:5, in steps 3 and 6


def suspects(run):
    return [json.loads(line) for line in (run.data / "suspects.jsonl").read_text().splitlines()]


class Weights(TrainerCallback):
    """After each step, by its number."""

    def __init__(self, model):
        self.model, self.after = model, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.after[state.global_step] = weights_of(self.model)


def spoil_gradient(model):
    parameter = next(model.projectors.parameters())
    parameter.register_hook(lambda gradient: gradient * float("inf"))


def spoil_states(model):
    model.causal_lm.model.norm.register_forward_hook(lambda *call: call[-1] * float("nan"))


def spoil_weight(model):
    with torch.no_grad():
        next(model.projectors.parameters()).view(-1)[0] = float("nan")


PLACES = {  # what is spoiled before step 3, and whether a row by itself gives such a loss
    "feature": (lambda model: None, poisoned, ["rows.csv:5"]),
    "gradient": (spoil_gradient, read, ["rows.csv:5", "rows.csv:6"]),
    "loss": (spoil_states, read, None),
}


@pytest.mark.parametrize(
    ("place", "accumulate"),
    [
        *((place, 1) for place in PLACES),
        *(pytest.param(one, 2, marks=pytest.mark.full) for one in ("feature", "gradient")),
    ],
)
def test_the_step_stops_its_rows_are_named_and_nothing_is_lost(place, accumulate, tmp_path):
    spoil, reader, expected = PLACES[place]
    run, model = RunFolder(tmp_path), composite_with_lora()
    keep = Weights(model)
    step = 3 if accumulate == 1 else 2
    with pytest.raises(TrainingError) as stopped:
        train_composite(
            model,
            run.checkpoints / "tune",
            callbacks=[keep, At(step, lambda: spoil(model))],
            collator=collator_of(NAMED, read=reader),
            accumulate=accumulate,
            save_every_n_steps=100,
        )
    message = str(stopped.value)
    assert f"at step {step}" in message and "--resume" not in message and "resume=True" in message
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, keep.after[step - 1][name]), name
    if expected is not None and accumulate == 1:
        assert [one["row"] for one in suspects(run)] == expected
        assert all(one["alone"] and not one["left_out"] and one["step"] == step for one in suspects(run))
    if place == "feature":
        assert "rows.csv:5" in message and [one["row"] for one in suspects(run)] == ["rows.csv:5"]
    checkpoint = newest_whole(run, "tune")  # of the step before, though none was due
    assert checkpoint.name == f"checkpoint-{step - 1}"
    saved = load_file(checkpoint / "projectors.safetensors")
    for name, weight in keep.after[step - 1].items():
        if name in saved:
            assert torch.equal(saved[name], weight)


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    run, model = RunFolder(tmp_path), composite_with_lora()

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                spoil_weight(model)

    with pytest.raises(TrainingError, match="a weight isn't finite after step 4; no checkpoint was written"):
        train_composite(model, run.checkpoints / "tune", callbacks=[Spoil()])
    assert newest_whole(run, "tune").name == "checkpoint-2"


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.full)])
def test_bad_rows_are_left_out_counted_and_listed_the_same_after_a_resume(accumulate, tmp_path, capsys):
    options = {"collator": collator_of(NAMED, read=poisoned), "settings": {"skip_bad_rows": True}}
    options |= {"accumulate": accumulate, "save_every_n_steps": 1}
    whole, run = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "run")
    model = composite_with_lora()
    train_composite(model, whole.checkpoints / "tune", **options)
    assert "left out, their loss isn't finite: rows.csv:5" in " ".join(capsys.readouterr().err.split())
    last = 6 // accumulate
    assert [(one["row"], one["step"], one["left_out"]) for one in suspects(whole)] == [
        ("rows.csv:5", -(-3 // accumulate), True),
        ("rows.csv:5", last, True),
    ]
    resumed = composite_with_lora()

    def cut():
        raise OSError("power cut")

    with pytest.raises(OSError):
        train_composite(resumed, run.checkpoints / "tune", callbacks=[At(last, cut)], **options)
    resumed = composite_with_lora()
    log = train_composite(resumed, run.checkpoints / "tune", resume_from=newest_whole(run, "tune"), **options)
    assert suspects(run) == suspects(whole) and len(log) == last
    for name, weight in weights_of(model).items():
        assert torch.equal(weights_of(resumed)[name], weight), name


@pytest.mark.parametrize(("left", "accumulate"), [([[4]], 1), ([[4]], 4), ([], 4)])
def test_what_is_left_is_trained_as_if_the_bad_row_had_never_been_there(left, accumulate, tmp_path):
    """The third row is [[3], [4]]: with 3 left out, [[4]]; or it is [[3]]. Without dropout, whose numbers depend on the
    length.
    """

    spoiled, clean = composite_without_dropout(), composite_without_dropout()
    rows = [[[0], [1]], [[2]], [[3], *left], [[5]]][: 4 if accumulate > 1 else 3]
    log = train_composite(
        spoiled,
        tmp_path / "checkpoints" / "a",
        rows=rows,
        collator=collator_of(NAMED, read=poisoned),
        accumulate=accumulate,
        settings={"skip_bad_rows": True},
    )
    expected = train_composite(
        clean,
        tmp_path / "checkpoints" / "b",
        rows=[row for row in [*rows[:2], left, *rows[3:]] if row],
        collator=collator_of(NAMED),
        accumulate=accumulate,
    )
    norms = [[entry["grad_norm"] for entry in entries] for entries in (log, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)  # Adam's steps would be as long with any other
    for name, weight in weights_of(clean).items():
        torch.testing.assert_close(
            weights_of(spoiled)[name], weight, atol=1e-7 if accumulate == 1 else 1e-4, rtol=1e-5, msg=name
        )


def test_answers_that_are_compared_are_left_out_together(tmp_path):
    named = [replace(sample, group="pair") if number in (3, 4) else sample for number, sample in enumerate(NAMED)]
    run = RunFolder(tmp_path)
    train_composite(
        composite_with_lora(),
        run.checkpoints / "tune",
        rows=[[[0], [1]], [[3], [2], [4]]],
        collator=collator_of(named, read=poisoned),
        settings={"skip_bad_rows": True},
    )
    assert [(one["row"], one["alone"], one["left_out"]) for one in suspects(run)] == [
        ("rows.csv:5", True, True),
        ("rows.csv:6", True, True),
    ]


@pytest.mark.full
def test_where_no_row_is_good_it_is_not_the_rows(tmp_path):
    bad = collator_of(NAMED, read=lambda medium: read(medium) * float("nan"))
    with pytest.raises(TrainingError, match="from none of the last 20 packed rows"):
        train_composite(
            composite_with_lora(),
            tmp_path / "checkpoints" / "tune",
            rows=[[[0], [1]], [[2]]] * 15,
            collator=bad,
            settings={"skip_bad_rows": True},
        )


def test_a_run_that_stopped_goes_on_with_a_lower_rate_or_without_the_rows(tmp_path, tried):
    """From what it had learnt, by one command each; the features of one picture are spoiled."""
    recipe = tiny_recipe(tmp_path, train__save_every_n_steps=1)
    whole = cli("train", recipe, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    rates = ("train.stages.1.learning_rate=1.0e-4", "train.stages.1.max_grad_norm=0.5")
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    spoil_features(path)
    stopped = cli("train", recipe, "--run", "run", cwd=tmp_path)
    assert stopped.returncode == 1 and "the loss is nan at step" in stopped.stderr, stopped.stderr
    assert "--resume" in stopped.stderr and "train.csv:" in stopped.stderr
    again = cli("train", recipe, "--run", "run", "--resume", cwd=tmp_path)
    assert again.returncode == 1 and "the loss is nan" in again.stderr  # nothing has changed
    refused = cli("train", recipe, "--run", "run", "--resume", "--set", "train.accumulate=2", cwd=tmp_path)
    assert refused.returncode == 1 and "train.accumulate: 1 there, 2 here" in refused.stderr
    sets = [word for one in (*rates, "train.skip_bad_rows=true") for word in ("--set", one)]
    done = cli("train", recipe, "--run", "run", "--resume", *sets, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "from here on: train.stages.1.learning_rate is 0.0001, was 0.005" in " ".join(done.stderr.split())
    run = RunFolder(tmp_path / "run")
    (row,) = {one["row"] for one in suspects(run)}
    assert row in stopped.stderr and {one["left_out"] for one in suspects(run)} == {False, True}
    log = json.loads((run.path / "metrics.json").read_text())["train"]["stages"]
    assert log["align"]["left_out"] == 1 and log["align"]["steps"] and log["tune"]["steps"]
    changes = [json.loads(line) for line in (run.data / "changes.jsonl").read_text().splitlines()]
    assert [one["key"] for one in changes if "rate" in one["key"]] == ["train.stages.1.learning_rate"]
    tried("a run that a row's features stopped by NaN", "rows named; one command goes on without them, at a lower rate")


def spoil_features(path):
    """Of one picture."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    first = sorted(tensors)[0]
    tensors[first] = tensors[first] * float("nan")
    metadata["crc32"] = json.dumps({key: checksum(tensor) for key, tensor in tensors.items()})
    save_file(tensors, path, metadata=metadata)
