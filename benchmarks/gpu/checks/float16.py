"""Training in float16 with its loss scaler, over 4-bit weights and by segments without the kernel for many lengths, as
on a T4: the losses of all steps against the same training in float32.
"""

from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.gpu.models import collator, composite, fresh_tokenizer, llm_folder, questions
from benchmarks.gpu.setting import Setting
from finetune.model.language_model import load_language_model
from finetune.model.row_layout import RowKind, row_kind
from finetune.recipe.schema import Llm, Stage, Train
from finetune.training.stage_training import StageTraining
from finetune.training.stopping import StopBetweenSteps
from finetune.training.trainer import train_stage

APART = 0.02  # of the first loss: the most by which those of a step may differ
# Heads of a width that isn't a multiple of 8, which the kernel for many lengths doesn't take.
SHAPE = {"hidden_size": 320, "num_attention_heads": 16, "num_key_value_heads": 4}


class Scaler(TrainerCallback):
    """Counts the steps that the scaler left out."""

    def __init__(self) -> None:
        self.skipped = 0

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.skipped += bool(getattr(optimizer, "step_was_skipped", False))


def check(setting: Setting) -> str:
    on_gpu = setting.device == "cuda"
    exact, _ = trained(setting, torch.float32)
    found, skipped = trained(setting, torch.float16 if on_gpu else torch.float32)
    for name, losses in (("float32", exact), ("float16", found)):
        assert losses[-1] < 0.8 * losses[0], f"{name}: the loss doesn't fall: {losses}"
    # Steps that were left out came to nothing: those after them follow, so many steps late.
    late = [abs(a - b) / exact[0] for a, b in zip(found[skipped:], exact[: len(exact) - skipped], strict=True)]
    assert max(late) < APART, f"losses in float16 {found}, in float32 {exact}, {skipped} steps skipped"
    scaled = f"the scaler left out {skipped} of {len(found)} steps" if on_gpu else "float32 twice: a CPU has no scaler"
    apart = f"{max(late):.1%} of the first from those in float32"
    return f"{scaled}; losses {found[0]:.3f} to {found[-1]:.3f}, at most {apart}"


def trained(setting: Setting, dtype: torch.dtype) -> tuple[list[float], int]:
    """Losses of the steps, and how many steps were left out."""
    folder = llm_folder(setting, "odd-heads", "qwen2", **SHAPE)
    llm = load_language_model(Llm(name=str(folder)), dtype, torch.device(setting.device))
    assert row_kind(llm) is RowKind.SHARED
    model = composite(llm)
    stage = Stage(name="tune", trains=["projectors", "adapter"], learning_rate=2e-3, warmup=0.0, scheduler="constant")
    scaler = Scaler()
    training = StageTraining(
        model=model,
        tokenizer=fresh_tokenizer(),
        stage=stage,
        settings=Train(stages=[stage], save_every_n_steps=1_000_000),
        collator=collator(setting, RowKind.SHARED),
        rows=[questions(setting)[1]] * (8 if setting.toy else 24),
        folder=setting.folder / f"float16-{dtype}" / "checkpoints" / "tune",
        seed=11,
        dtype=dtype,
    )
    with StopBetweenSteps() as stop:
        log = train_stage(training, stop, callbacks=[scaler])
    assert all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad), "a weight isn't finite"
    return [entry["loss"] for entry in log], scaler.skipped
