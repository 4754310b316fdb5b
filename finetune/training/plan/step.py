"""One training step of a stage, its tensors counted: on tensors without data, or for real."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from finetune.model.composite import MultimodalModel
from finetune.model.module_names import is_lora
from finetune.model.row_plan import by_segments
from finetune.model.trainable import set_trainable, trained_parts
from finetune.training.collate import Batch
from finetune.training.plan.meter import AutocastOnGpu, Meter, gpu_autocasts
from finetune.training.stage_training import StageTraining, packed_rows, trainer_arguments
from finetune.training.trainer import StageTrainer

OWN_ROLES = ("encoders", "projectors", "fusion", "heads")


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak of a step after the first one. `weights`: {role: bytes}, the LLM under `language_model`;
    `flops` and `calls` (of operations) of one packed row, forward and backward, with what activation checkpoints
    compute again.
    """

    weights: dict[str, int]
    optimizer: int
    gradients: int
    activations: int
    flops: int
    calls: int

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.optimizer + self.gradients + self.activations


def measure_step(training: StageTraining, batch: Batch, meter: Meter, gpu: bool) -> StepMemory:
    """A stage's step on one packed row, by the stage's own trainer. Called within `meter`, which has counted the
    model's weights. `gpu`: under autocast, as a GPU trains.
    """
    model, stage = training.model, training.stage
    set_trainable(model, stage.trains)
    parts = trained_parts(model, stage.trains)
    arguments = trainer_arguments(training)
    arguments.bf16_full_eval = True  # so that the Trainer leaves the model where it is: without data it can't be moved
    arguments.output_dir, arguments.report_to = gettempdir(), []  # the Trainer makes the folder, and asks for trackers
    trainer = StageTrainer(
        training,
        parts,
        model=model,
        args=arguments,
        train_dataset=packed_rows(training.rows),
        data_collator=training.collator,
        processing_class=training.tokenizer,
    )
    weights = weights_of(model)
    for tensor in (*tensors_of(model), *tree_leaves(batch)):  # loaded ones are no operation's result
        meter.note(tensor)
    optimizer = trainer.create_optimizer()
    before = meter.live
    meter.reset()
    model.train()
    steps = min(training.settings.accumulate, 2)
    autocasts = gpu and training.dtype != torch.float32
    with gpu_autocasts() if autocasts else nullcontext():
        for _ in range(steps):  # the second one finds gradients of the first
            with by_segments(model.causal_lm) if "row_plan" in batch else nullcontext():
                with AutocastOnGpu(training.dtype) if autocasts else nullcontext():
                    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=None)
                loss.backward()
        del loss
    trained = [p for parameters in parts.values() for p in parameters]
    gradients = size_of(p.grad for p in trained)
    added, flops, calls = meter.peak - before, meter.flops // steps, meter.calls // steps
    optimizer.step()
    states = size_of(each for state in optimizer.state.values() for each in state.values() if isinstance(each, Tensor))
    model.zero_grad()
    for patched in ("forward", "_original_forward"):  # trl's fused head, as in `train_stage`
        model.__dict__.pop(patched, None)
    return StepMemory(weights, states, gradients, max(added - gradients, 0), flops, calls)


def weights_of(model: MultimodalModel) -> dict[str, int]:
    """Bytes of each role's parameters and buffers: 'language_model', 'adapter', 'projectors.image' and the like. What
    several media of a base share is the first one's.
    """
    adapter = [p for name, p in model.language_model.named_parameters() if "lora_" in name]
    of_base = _roles_of_base(model) if model.composition.base else {}
    sizes = {
        "language_model": size_of(tensors_of(model.language_model)) - size_of(adapter) - sum(of_base.values()),
        "adapter": size_of(adapter),
        **of_base,
    }
    for role in OWN_ROLES:
        group = getattr(model, role)
        members = group.items() if isinstance(group, nn.ModuleDict) else [("", group)]
        sizes |= {f"{role}.{name}".removesuffix("."): size_of(tensors_of(module)) for name, module in members}
    return {role: size for role, size in sizes.items() if size}


def _roles_of_base(model: MultimodalModel) -> dict[str, int]:
    """Bytes of the parameters of a base's encoders and projectors."""
    sizes: dict[str, int] = {}
    seen: set[str] = set()
    for group in ("encoder", "projector"):
        for medium, roles in model.roles.items():
            own = [name for name in getattr(roles, group) if name not in seen and not is_lora(name)]
            sizes[f"{group}s.{medium}"] = size_of(model.causal_lm.get_parameter(name) for name in own)
            seen.update(own)
    return sizes


def tensors_of(module: nn.Module) -> Iterable[Tensor]:
    """Parameters and buffers, and the scales of quantized ones."""
    for parameter in module.parameters():
        yield parameter
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.offset, state.state2.absmax, state.state2.code)
        scales: Any = getattr(parameter, "SCB", None)
        if scales is not None:
            yield scales
    yield from module.buffers()


def size_of(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of their storages, each counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def on_paper(batch: Any) -> Any:
    """A batch whose features have no data; ids, positions and labels keep theirs. So do media that a base's processor
    has prepared: its pixels tell which parts of a picture are padding.
    """
    paper = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype) if t.is_floating_point() else t, batch)
    named = {kind: all_ for kind, all_ in batch.get("media", {}).items() if all_ and isinstance(all_[0], Mapping)}
    return {**paper, "media": {**paper["media"], **named}} if named else paper
