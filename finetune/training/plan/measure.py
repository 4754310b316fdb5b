"""What a recipe takes on a card, phase by phase: each is run once on tensors without data, which are counted."""

import gc
from dataclasses import dataclass
from typing import Any

import torch

from finetune.model.adapter import trained_tensors
from finetune.model.composite import MultimodalModel
from finetune.model.row_layout import Layout, RowKind, likely_layout
from finetune.model.teacher_distributions import TeacherDistributions
from finetune.recipe.load import Recipe
from finetune.recipe.schema import Stage
from finetune.training.collate import Batch, PackedRow
from finetune.training.plan.meter import Meter, Rehearsal, with_data
from finetune.training.plan.result import Phase
from finetune.training.plan.rows import PlannedRows, PlannedRun, StageRows
from finetune.training.plan.shapes import base_on_meta, language_model_on_meta, without_data
from finetune.training.plan.step import measure_step, on_paper, size_of, tensors_of, weights_of
from finetune.training.rollouts import longest_answers, row_kind_of_answers
from finetune.training.samples import TokenizedSamples
from finetune.training.stage_training import StageTraining
from finetune.training.train import set_up


@dataclass(frozen=True)
class StageWork:
    """`rows`: packed rows of all epochs; `fullest`: tokens of the one that was measured."""

    rows: int
    tokens: int
    fullest: int


@dataclass(frozen=True)
class Measured:
    """`phases` in order: `encode KIND`, `train STAGE`, `evaluate`. `features`: {kind: bytes of all media in the cache}.
    `trained`: bytes of what the adapter folder holds; `checkpoint`: bytes of the largest; `weights_16bit`: bytes of the
    LLM's weights in 16 bits; `packed`: whether samples share rows.
    """

    phases: tuple[Phase, ...]
    stages: dict[str, StageWork]
    features: dict[str, int]
    trained: int
    checkpoint: int
    weights_16bit: int
    kv_token: int
    longest: int
    layout: Layout


def measure(recipe: Recipe, rows: PlannedRows, gpu: bool) -> Measured:
    """`recipe`: with its LLM's dtype named. Raises ModelError, DataError."""
    planned = PlannedRun(recipe, rows)
    components, dtype = planned.run.components, planned.run.components.dtype
    model = composed(planned, recipe, dtype)
    by_segments = recipe.model.language_model.attention == "auto"
    layout = likely_layout(model.causal_lm, recipe.train.share_prefixes, by_segments)
    weights_16bit = 2 * sum(p.numel() for name, p in model.language_model.named_parameters() if "lora_" not in name)
    if components.base is not None:
        _ = model.examples  # prepared here, with data
    with Rehearsal() as meter:
        without_data(model, dtype)
        for encoder in components.encoders.values():
            if recipe.train.cache and components.base is None:
                without_data(encoder.module, dtype)
        phases: list[Phase] = []
        features: dict[str, int] = {}
        for kind, count in rows.media.items() if recipe.train.cache else ():
            phase, size = _encode(planned, model, kind, meter)
            phases.append(phase)
            features[kind] = size * count
        stages: dict[str, StageWork] = {}
        states = 0
        for number, stage in enumerate(recipe.train.stages):
            with with_data():
                training, batch, in_all = step_of(planned, model, stage, layout.kind, recipe.seed + 1000 * number)
            memory = measure_step(training, on_paper(batch), meter, gpu)
            tokens = batch["input_ids"].numel()
            stages[stage.name] = StageWork(in_all.rows, in_all.tokens, tokens)
            states = max(states, memory.optimizer)
            parts = {**memory.weights, "optimizer": memory.optimizer, "gradients": memory.gradients}
            parts["activations"] = memory.activations
            phases.append(Phase(f"train {stage.name}", parts, memory.flops, memory.calls))
        evaluation, kv_token, longest = _evaluate(planned, model, meter)
        phases.append(evaluation)
        trained = size_of(trained_tensors(model).values())
    return Measured(
        phases=tuple(phases),
        stages=stages,
        features=features,
        trained=trained,
        checkpoint=trained + states,
        weights_16bit=weights_16bit,
        kv_token=kv_token,
        longest=longest,
        layout=layout,
    )


def composed(planned: PlannedRun, recipe: Recipe, dtype: torch.dtype) -> MultimodalModel:
    """The composite as training builds it, on the meta device. LoRA begins as zeros whatever the recipe says: other
    beginnings are computed from the weights, and take as much memory.
    """
    adapter = recipe.adapter and recipe.adapter.model_copy(update={"initialization": "default"})
    planned.run.recipe = recipe.model_copy(update={"adapter": adapter})
    llm = recipe.model.language_model.model_copy(update={"quantize": "none"} if recipe.train.dequantize_once else {})
    base = planned.run.components.base
    language_model = language_model_on_meta(llm, dtype) if base is None else base_on_meta(base, llm.quantize)
    model = planned.run.build(with_encoders=not recipe.train.cache, language_model=language_model)
    set_up(model, recipe.train)
    return model


def _encode(planned: PlannedRun, model: MultimodalModel, kind: str, meter: Meter) -> tuple[Phase, int]:
    """The phase, and the mean bytes of a medium's features."""
    encoder = planned.run.components.encoders[kind]
    with with_data():
        prepared = planned.some_media(kind)
    most: Any = max(prepared, key=lambda one: sum(tensor.numel() for tensor in one.tensors))
    of_base = model.composition.base
    batch = 1 if of_base else planned.run.recipe.train.encode_batch
    gc.collect()
    before = meter.live
    meter.reset()
    with torch.no_grad():
        values = most.values if of_base else torch.empty(batch, *most.values.shape)
        features = encoder.encode(values)
    activations, flops, calls = meter.peak - before, meter.flops // batch, meter.calls // batch
    segment = features.nbytes / batch / len(most.layout.marks) / most.layout.rows
    size = sum(segment * len(one.layout.marks) * one.layout.rows for one in prepared) / len(prepared)
    parts = weights_of(model) if of_base else {f"encoders.{kind}": size_of(tensors_of(encoder.module))}
    parts.pop("adapter", None)  # comes later
    return Phase(f"encode {kind}", {**parts, "activations": activations}, flops, calls), round(size)


def step_of(
    planned: PlannedRun, model: MultimodalModel, stage: Stage, kind: RowKind, seed: int
) -> tuple[StageTraining, Batch, StageRows]:
    """What a stage trains with, and the batch of its fullest row."""
    rows = planned.stage_rows(stage, model, kind, seed)
    collator = planned.collator(rows.samples, kind, heads=planned.run.weighted and stage.objective.heads)
    if stage.objective.reference:
        collator.reference = [torch.zeros(count) for count in rows.samples.learned]
    if stage.objective.needs == "teacher":
        collator.distributions = placeholder_distributions(rows.samples, stage)
    training = StageTraining(
        model=model,
        tokenizer=planned.run.components.tokenizer,
        stage=stage,
        settings=planned.run.recipe.train,
        collator=collator,
        rows=[rows.fullest] * rows.rows,
        folder=planned.run.folder.checkpoints / stage.name,
        seed=seed,
        dtype=planned.run.components.dtype,
    )
    if stage.objective.samples_answers:
        collator.kind = row_kind_of_answers(kind, model.composition.fusion)
        return training, longest_answers(stage, collator, rows.fullest), rows
    return training, collator([PackedRow(groups=rows.fullest, filler=False)]), rows


def placeholder_distributions(samples: TokenizedSamples, stage: Stage) -> list[TeacherDistributions] | None:
    """Distributions of the size of a teacher's; None where only its answers are learned."""
    options: Any = stage.objective.options
    if options.by == "answers":
        return None
    learned = [samples[number].learned for number in range(len(samples))]
    number, share = torch.zeros((), dtype=torch.long), torch.zeros(())
    return [
        TeacherDistributions(
            number.expand(count, options.top_k), share.expand(count, options.top_k), share.expand(count), 1.0
        )
        for count in learned
    ]


def _evaluate(planned: PlannedRun, model: MultimodalModel, meter: Meter) -> tuple[Phase, int, int]:
    """Prompts read with their keys and values kept, and room for those of the answers. Also the bytes of keys and
    values of a token, and the tokens of the longest sample.
    """
    evaluate = planned.run.recipe.evaluate
    with with_data():
        prompts = planned.prompts(evaluate.batch)
    batch: Any = on_paper(prompts)
    model.eval()
    gc.collect()
    before = meter.live
    meter.reset()
    given = ("input_ids", "features", "media", "attention_mask", "position_ids", "token_type_ids")
    with torch.no_grad():
        keep = {"logits_to_keep": 1} if model.llm_takes("logits_to_keep") else {}
        outputs = model(**{name: batch[name] for name in given if name in batch}, use_cache=True, **keep)
    length = batch["input_ids"].shape[1]
    memory = getattr(outputs, "past_key_values", None)
    layers = getattr(memory, "layers", ())
    kept = size_of(t for layer in layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None)))
    kv_token = kept // (evaluate.batch * length)
    answers = kv_token * evaluate.batch * evaluate.max_new_tokens
    parts = weights_of(model)
    if planned.run.recipe.train.cache and not model.composition.base:
        parts |= {f"encoders.{n}": size_of(tensors_of(e.module)) for n, e in planned.run.components.encoders.items()}
    parts |= {"keys and values": kept + answers, "activations": max(meter.peak - before - kept, 0)}
    return Phase("evaluate", parts, meter.flops // evaluate.batch, meter.calls // evaluate.batch), kv_token, length
