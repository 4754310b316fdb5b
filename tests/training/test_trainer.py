import signal

import pytest
import torch
from packed import (
    ROWS,
    SAMPLES,
    At,
    batch_of,
    collator_of,
    composite_with_lora,
    power_cut,
    read,
    samples_of,
    shake,
    train_composite,
    weights_of,
)
from tiny import PLACEHOLDER, part, tiny_encoder, tiny_llm_folder
from transformers import TrainerCallback

from finetune.common.errors import Interrupted, TrainingError
from finetune.common.run_folder import RunFolder
from finetune.model.adapter import attach
from finetune.model.compose import compose
from finetune.model.language_model import load_language_model
from finetune.model.trainable import set_trainable, trained_parts
from finetune.recipe.schema import Adapter, Llm
from finetune.training.checkpoints import step_of
from finetune.training.trainer import StageTrainer

pytestmark = pytest.mark.slow


class Keep(TrainerCallback):
    """The trained weights after each step."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(weights_of(self.model))


def interrupt():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("act, expected, step", [(power_cut, OSError, 4), (interrupt, Interrupted, 3)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_ends_on_the_weights_of_an_uninterrupted_one(act, expected, step, accumulate, tmp_path):
    whole = composite_with_lora()
    log = train_composite(whole, tmp_path / "whole", accumulate=accumulate)
    assert len(log) == len(ROWS) // accumulate
    every = 2 if accumulate == 1 else 1
    step = step if accumulate == 1 else step - 1
    with pytest.raises(expected):
        train_composite(
            composite_with_lora(),
            tmp_path / "cut",
            callbacks=[At(step, act)],
            accumulate=accumulate,
            save_every_n_steps=every,
        )
    checkpoint = max((tmp_path / "cut").glob("checkpoint-*"), key=step_of)
    resumed = composite_with_lora()
    rest = train_composite(resumed, tmp_path / "cut", resume_from=checkpoint, accumulate=accumulate)
    assert [entry["loss"] for entry in rest] == pytest.approx([entry["loss"] for entry in log])
    for name, weight in weights_of(whole).items():
        torch.testing.assert_close(weights_of(resumed)[name], weight, atol=1e-7, rtol=0, msg=name)


def test_only_what_the_stage_trains_changes(tmp_path):
    model = composite_with_lora()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_composite(model, tmp_path)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.startswith("projectors.") or ".lora_" in name}


def test_a_stage_of_projectors_leaves_the_adapter_alone(tmp_path):
    model = composite_with_lora()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_composite(model, tmp_path, trains=["projectors.image"])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.startswith("projectors.")}


def test_training_learns(tmp_path):
    log = train_composite(composite_with_lora(), tmp_path, learning_rate=3e-2, scheduler="constant", warmup=0.0)
    assert log[3]["loss"] > 0 and min(log[4]["loss"], log[5]["loss"]) < log[0]["loss"]


def test_the_logged_loss_is_the_mean_over_the_learned_tokens(tmp_path):
    model = composite_with_lora().eval()
    batch = batch_of(SAMPLES, [0, 1])
    inputs = {key: value for key, value in batch.items() if key not in {"label_rows", "shift_labels"}}
    expected = model(**inputs, use_cache=False).loss.item()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert train_composite(model, tmp_path)[0]["loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("family", "accumulate"), [("llama", 1), ("mixtral", 2), ("phimoe", 1)])
def test_weighted_losses_of_equal_weights_are_the_plain_ones(family, accumulate, tmp_path):
    """The branch for heads and weights, with no head and all weights 1, against trl's own loss, an auxiliary one of
    routers included.
    """
    options = {"accumulate": accumulate, "save_every_n_steps": 100}
    dropout = 0.1 if family == "llama" else 0.0  # PEFT has none for experts
    torch.manual_seed(0)
    plain = train_composite(composite_with_lora(family, dropout), tmp_path / "plain", **options)
    torch.manual_seed(0)
    collator = collator_of(SAMPLES, heads={})
    weighted = train_composite(
        composite_with_lora(family, dropout), tmp_path / "weighted", collator=collator, **options
    )
    assert len(plain) == len(weighted) > 2
    for theirs, ours in zip(plain, weighted, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["num_tokens"] == theirs["num_tokens"] > 0
        assert ours["mean_token_accuracy"] == pytest.approx(theirs["mean_token_accuracy"])


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    model = composite_with_lora()
    keep = Keep(model)

    def poisoned(medium):
        return read(medium) * (float("nan") if medium.key == "3" else 1.0)  # in the third row

    with pytest.raises(TrainingError, match="the loss is nan at step 3"):
        train_composite(model, tmp_path, callbacks=[keep], collator=collator_of(SAMPLES, read=poisoned))
    assert len(keep.steps) == 2
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, keep.steps[-1][name]), name
        assert torch.isfinite(weight).all()


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    model = composite_with_lora()
    keep = Keep(model)
    parameter = next(model.projectors.parameters())
    spoil = At(3, lambda: parameter.register_hook(lambda gradient: gradient * float("inf")))
    with pytest.raises(TrainingError, match="a gradient isn't finite at step 3"):
        train_composite(model, tmp_path, callbacks=[keep, spoil])
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, keep.steps[-1][name]), name


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    save = StageTrainer._save_optimizer_and_scheduler

    def full_disk(self, folder):
        if self.state.global_step == 4:
            raise OSError("no space left")
        save(self, folder)

    monkeypatch.setattr(StageTrainer, "_save_optimizer_and_scheduler", full_disk)
    run = RunFolder(tmp_path)
    with pytest.raises(OSError, match="no space left"):
        train_composite(composite_with_lora(), run.checkpoints / "tune")
    assert run.checkpoints_of("tune")[0].name == "checkpoint-2"
    assert [path.name for path in (run.checkpoints / "tune").iterdir()] == ["checkpoint-2"]
    names = {path.name for path in (run.checkpoints / "tune" / "checkpoint-2").iterdir()}
    assert {
        "adapter_model.safetensors",
        "projectors.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    } <= names


@pytest.mark.parametrize("double_quantize", [True, False])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 0.03), (torch.bfloat16, 0.1)])
def test_gradients_cross_4_bit_layers_that_have_answered_before(dtype, bound, double_quantize, tmp_path):
    """On CPUs with AVX-512 BF16, bitsandbytes' layers forget their graph after a forward without gradients."""
    folder = tiny_llm_folder(tmp_path)
    encoder = tiny_encoder()
    batch = batch_of(samples_of([9, 6]), [0, 1])
    batch["input_ids"][batch["input_ids"] == PLACEHOLDER] = 415
    inputs = {key: value for key, value in batch.items() if key not in {"label_rows", "shift_labels"}}

    def gradients(dequantized: bool) -> list[torch.Tensor]:
        language_model = load_language_model(Llm(name=str(folder), double_quantize=double_quantize), dtype)
        if dequantized:
            language_model = language_model.dequantize(dtype=dtype)
        torch.manual_seed(0)
        model = compose(
            language_model,
            encoders={"image": encoder},
            projectors={"image": part("projectors", "pixel_shuffle")},
            fusion=part("fusion", "prefix"),
            placeholder_ids={"image": 415},
        )
        attach(model, Adapter(rank=2, alpha=4.0))
        shake(model)
        with torch.no_grad():
            model.eval()(**inputs)
        set_trainable(model, ["projectors", "adapter"])
        model(**inputs, use_cache=False).loss.backward()
        return [p.grad.float() for p in [*model.projectors.parameters(), *trained_parts(model, ["adapter"])["adapter"]]]

    for got, expected in zip(gradients(False), gradients(True), strict=True):
        assert expected.norm() > 0
        assert (got - expected).norm() < bound * expected.norm()
