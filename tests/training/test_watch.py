"""What seems wrong with a stage is reported while it trains, and kept."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from packed import SAMPLES, At, collator_of, composite_with_lora, train_composite, training_of

from finetune.training.stage_training import suspects_of
from finetune.training.watch import StageWatch, read_warnings, spike

pytestmark = pytest.mark.slow
NAMED = [replace(sample, where=f"rows.csv:{number + 2}") for number, sample in enumerate(SAMPLES)]
ROWS = [[[0], [1]], [[2], [3]], [[4], [5]]] * 18


def told(folder):
    return [(one.kind, one.step) for one in read_warnings(folder / "data" / "warnings.jsonl")]


def trained(folder, *callbacks, model=None, rows=ROWS, **options):
    options = {"collator": collator_of(NAMED), "save_every_n_steps": 100} | options
    model = model or composite_with_lora()
    return train_composite(model, folder / "checkpoints" / "tune", callbacks=callbacks, rows=rows, **options)


def test_a_stage_that_learns_gives_no_warning(tmp_path):
    log = trained(tmp_path)
    assert log[-1]["loss"] < log[0]["loss"] - 1 and told(tmp_path) == []


def test_an_absurd_rate_is_told(tmp_path, capsys):
    """Its loss is finite, and flat above that of guessing: the entropy of the tokens."""
    log = trained(tmp_path, learning_rate=30.0)
    assert all(math.isfinite(entry["loss"]) for entry in log)
    ((kind, step),) = told(tmp_path)
    assert kind in ("risen", "flat") and 50 <= step <= 54
    assert f"tune: step {step}: the loss" in " ".join(capsys.readouterr().err.split())


def test_guessing_is_the_entropy_of_the_learned_tokens(tmp_path):
    tokens = [5] * 3 + [6] * 3
    samples = [
        replace(one, input_ids=[1, 2, token, 9], labels=[-100, -100, token, 9])
        for one, token in zip(NAMED, tokens, strict=True)
    ]
    training = training_of(composite_with_lora(), tmp_path / "a" / "b", collator=collator_of(samples))
    watch = StageWatch(training, {}, suspects_of(training))
    assert watch._guessing() == pytest.approx(1.5 * math.log(2))  # half are 9, a quarter each 5 and 6


def test_a_spike_is_told_with_its_rows_and_told_again_where_a_run_goes_on_before_it(tmp_path):
    model = composite_with_lora()

    def disturb():
        with torch.no_grad():
            model.causal_lm.lm_head.weight.mul_(100)

    trained(tmp_path, At(31, disturb), model=model, rows=ROWS[:36], learning_rate=1e-3)
    (warning,) = [one for one in read_warnings(tmp_path / "data" / "warnings.jsonl") if one.kind == "spike"]
    assert warning.step == 33 and "step 31, rows.csv:2, rows.csv:3" in warning.text
    watch = StageWatch(training_of(model, tmp_path / "checkpoints" / "tune"), {}, None)
    state = SimpleNamespace(global_step=33, log_history=[])
    watch.on_train_begin(None, state, None)
    assert told(tmp_path) == [("spike", 33)]
    state.global_step = 32
    watch.on_train_begin(None, state, None)
    assert told(tmp_path) == []


@pytest.mark.parametrize(
    ("losses", "middle"),
    [
        ([2.0, 2.1] * 12, None),
        ([2.0, 2.1] * 10 + [5.0] * 3, 2.05),
        ([2.0, 2.1] * 10 + [5.0, 2.0, 5.0], None),  # single rows that are hard
        ([2.0, 2.1] * 10 + [2.6] * 3, None),
        ([1e-3, 2e-3] * 10 + [0.2] * 3, None),  # what has been learned by heart
        ([1.0, 4.0] * 10 + [6.0] * 3, None),
        ([9.0] * 3, None),
    ],
)
def test_a_spike_lies_far_above_the_median_for_three_steps(losses, middle):
    assert spike(losses) == (middle and pytest.approx(middle))


def test_a_part_without_gradient_is_told(tmp_path):
    """Not where the steps have none of its media."""
    model = composite_with_lora()
    model.projectors["image"].register_forward_hook(lambda module, inputs, output: output.detach())
    trained(tmp_path / "cut", model=model, rows=ROWS[:14])
    assert told(tmp_path / "cut") == [("projectors.image", 10)]
    cut = {key: [] for key in ("media_kinds", "media_keys", "media_paths", "media_begins", "media_ends")}
    text = [replace(one, input_ids=one.input_ids[5:], labels=one.labels[5:], **cut) for one in NAMED]
    trained(tmp_path / "text", rows=ROWS[:14], collator=collator_of(text))
    assert told(tmp_path / "text") == []
