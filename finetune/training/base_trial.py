"""Which layouts of training rows are exact for a base: tried on three short samples with a medium, or one of each kind
that a task shows together, against the base's own forward pass over one of them alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from finetune.common.errors import ModelError
from finetune.data.media import noise
from finetune.data.sample import Medium, Message, Prepared, Sample
from finetune.model.base.both_ways import answer_types
from finetune.model.build import Components
from finetune.model.composite import MultimodalModel
from finetune.model.padding import left_padded_positions, position_ids
from finetune.model.prefixes import prompt_tokens
from finetune.model.row_layout import ROUNDED, RowKind, short_windows, tolerance, unless_refused, why_unshared
from finetune.model.row_plan import by_segments
from finetune.model.tokenize import Tokens, tokenize
from finetune.training.collate import Collator, PackedRow
from finetune.training.samples import TokenizedSample, TokenizedSamples

KINDS = (RowKind.SHARED, RowKind.SEGMENTS, RowKind.PACKED, RowKind.PADDED)
# (question, answer): the last two may share their question, the first differs from both.
SAMPLES = (("Why?", "f g"), ("What is this?", "a b c"), ("What is this?", "d e"))
TYPES = {"image": 1, "video": 2, "audio": 3}  # of tokens, in transformers


class _TrialMedia:
    """The media of the trial, each prepared once."""

    def __init__(self, components: Components) -> None:
        self.encoders = components.encoders
        self.prepared: dict[str, Prepared] = {}

    def of(self, medium: Medium) -> Prepared:
        if medium.kind not in self.prepared:
            self.prepared[medium.kind] = self.encoders[medium.kind].prepare(medium.content)
        return self.prepared[medium.kind]


def base_row_kind(
    model: MultimodalModel, components: Components, shown: Sequence[tuple[str, ...]], share: bool, segments: bool
) -> tuple[RowKind, str]:
    """The best layout that is exact for samples with media, and a line to print about it. `shown`: the kinds of media
    of each task, tried one by one and together. Without `segments`, by the base's own attention. Raises ModelError
    where not even single samples are as they are alone in the base's own forward.
    """
    why = why_unshared(model.causal_lm) if share else ""
    allowed = [kind for kind in KINDS if (share and not why) or kind is not RowKind.SHARED]
    allowed = [kind for kind in allowed if segments or kind in (RowKind.PACKED, RowKind.PADDED)]
    before = model.training
    model.eval()
    try:
        for kinds in dict.fromkeys([*((kind,) for task in shown for kind in task), *filter(None, shown)]):
            with short_windows(model.causal_lm):
                allowed = list(_exact(model, components, kinds, allowed))
            if not allowed:
                together = f"{' and '.join(kinds)} in one sample" if len(kinds) > 1 else kinds[0]
                raise ModelError(
                    f"model.base: {type(model.causal_lm).__name__} with {together} can't be trained here: the "
                    "outputs for our rows differ from those of its own forward pass"
                )
    finally:
        model.train(before)
    name = type(model.causal_lm).__name__
    line = f"{name} is opened: its decoder reads features of its encoders, in rows that are {allowed[0]}"
    return allowed[0], f"{line}: {why}" if why and allowed[0] is RowKind.SEGMENTS else line


@torch.no_grad()
def _exact(
    model: MultimodalModel, components: Components, kinds: Sequence[str], allowed: Sequence[RowKind]
) -> Iterator[RowKind]:
    shown = _TrialMedia(components)
    samples = [_sample(components, kinds, *texts, shown) for texts in SAMPLES]
    answered = _answered(samples[-1])
    _refuse_seeing_ahead(model, samples[-1], shown)
    native = _native_states(model, samples[-1], shown)[-answered:]
    native, allowed_error = native.float(), tolerance(model.causal_lm)
    table = TokenizedSamples.of(TokenizedSample.of(tokens, f"trial {number}") for number, tokens in enumerate(samples))
    features = {medium: model.encode(medium, [prepared.values])[0] for medium, prepared in shown.prepared.items()}
    for row_kind in allowed:
        collator = Collator(
            table,
            lambda medium: features[medium.kind],
            field="features",
            kind=row_kind,
            prompts_both_ways=model.placement.prompts_both_ways,
        )
        groups = [[0], [1, 2]] if row_kind is RowKind.SHARED else [[0], [1], [2]]
        batch: Any = collator([PackedRow(groups=groups, filler=False)])
        device = model.get_input_embeddings().weight.device
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        states = unless_refused(partial(_states, model, batch))
        if states is None:
            continue
        own = states[-1, : len(samples[-1].input_ids)] if row_kind is RowKind.PADDED else states[0]
        if (own[-answered:].float() - native).norm() < allowed_error * native.norm():
            yield row_kind


def _states(model: MultimodalModel, batch: Any) -> Tensor:
    """(B, T, D): last hidden states."""
    taken = ("input_ids", "features", "position_ids", "token_type_ids", "attention_mask", "row_plan")
    with by_segments(model.causal_lm) if "row_plan" in batch else nullcontext():
        outputs = model.backbone(**{name: batch[name] for name in taken if name in batch}, use_cache=False)
    states: Tensor = outputs.last_hidden_state
    return states


def _refuse_seeing_ahead(model: MultimodalModel, tokens: Tokens, shown: _TrialMedia) -> None:
    """Raises ModelError where the tokens of an answer see those behind them, and so what they are to learn."""
    features = {kind: [model.encode(kind, [prepared.values])[0]] for kind, prepared in shown.prepared.items()}
    device = model.get_input_embeddings().weight.device
    states = []
    for last in (tokens.input_ids[-1], 0):
        ids = torch.tensor([[*tokens.input_ids[:-1], last]], device=device)
        mask = torch.ones_like(ids)
        beside: dict[str, Any] = {"position_ids": position_ids(mask, left_padded_positions([tokens.positions], mask))}
        if model.placement.prompts_both_ways:
            beside["token_type_ids"] = answer_types(mask, [prompt_tokens(tokens.labels)])
        outputs = model.backbone(ids, features, attention_mask=mask, use_cache=False, **beside)
        states.append(outputs.last_hidden_state[0, :-1].float())
    if (states[0] - states[1]).norm() > ROUNDED * states[0].norm():
        raise ModelError(
            f"model.base: in {type(model.causal_lm).__name__} the tokens of an answer see those behind them, so that "
            "nothing could be learned from answers here: take another base"
        )


def _answered(tokens: Tokens) -> int:
    """Tokens of the answer and what is behind it: they aren't shared."""
    return len(tokens.labels) - prompt_tokens(tokens.labels)


def _sample(components: Components, kinds: Sequence[str], question: str, answer: str, shown: _TrialMedia) -> Tokens:
    media = [Medium(kind, Path(f"trial {kind}"), known_key=f"trial {kind}", content=noise(kind)) for kind in kinds]
    messages = (Message("user", (*media, question)), Message("assistant", (answer,)))
    segments = components.placement.segments_by(lambda one: shown.of(one).layout)
    return tokenize(Sample(messages, "trial"), components.tokenizer, components.placeholders, segments)


def _native_states(model: MultimodalModel, tokens: Tokens, shown: _TrialMedia) -> Tensor:
    """(T, D): of one sample, by the base's own forward of its prepared media."""
    base = model.causal_lm.base_model
    like = model.get_input_embeddings().weight
    inputs = BatchFeature()
    for prepared in shown.prepared.values():
        if isinstance(prepared.values, Mapping):
            inputs.update(prepared.values)
    given = {**inputs.to(like.device, like.dtype)}
    ids = torch.tensor([tokens.input_ids], device=like.device)
    types = torch.zeros_like(ids)
    for name, number in model.composition.placeholders.items():
        types[ids == number] = TYPES[name]
    mask = torch.ones_like(ids)
    both_ways = model.placement.prompts_both_ways
    own = answer_types(mask, [prompt_tokens(tokens.labels)]) if both_ways else (types > 0).long()
    given |= {"mm_token_type_ids": types, "token_type_ids": own, "attention_mask": mask}
    taken = signature(base.forward).parameters
    given = {name: value for name, value in given.items() if name in taken}
    states: Tensor = base(**{**given, "input_ids": ids}, use_cache=False).last_hidden_state[0]
    return states
