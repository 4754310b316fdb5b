"""Answers that begin and end together, by transformers' `generate`: for LLMs with another state than keys and values,
and for fusions that keep a batch's media between its steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from finetune.model.assistant import Assistant
from finetune.model.base.both_ways import answer_types
from finetune.model.padding import going_on, left_padded, left_padded_positions, position_ids
from finetune.serving.engine.generation import Generation, choose_tokens, features_of


class _OwnChoice(LogitsProcessor):
    """Leaves in each row of scores only the token that its answer chooses."""

    def __init__(self, generations: Sequence[Generation], pad: int) -> None:
        self.generations, self.pad = generations, pad

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        choose_tokens(self.generations, scores)
        for generation in self.generations:
            generation.send_last()
        tokens = [generation.tokens[-1] if generation.tokens else self.pad for generation in self.generations]
        only = torch.full_like(scores, float("-inf"))
        return only.scatter_(1, torch.tensor(tokens, device=scores.device)[:, None], 0.0)


class _Done(StoppingCriteria):
    def __init__(self, generations: Sequence[Generation]) -> None:
        self.generations = generations

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        for generation in self.generations:
            generation.check_deadline()
        return torch.tensor([generation.done for generation in self.generations], device=input_ids.device)


def generate(assistant: Assistant, generations: Sequence[Generation]) -> None:
    """Complete answers of equal `strengths`, their media encoded. Raises what the model raises."""
    model, pad = assistant.model, assistant.tokenizer.pad_token_id
    device = model.get_input_embeddings().weight.device
    ids, mask = left_padded([generation.input_ids for generation in generations], pad, device)
    positions = [going_on(one.prompt.positions, len(one.input_ids) - len(one.prompt.input_ids)) for one in generations]
    beside: dict[str, Any] = {}
    if (rope := left_padded_positions(positions, mask)) is not None:
        beside["position_ids"] = position_ids(mask, rope)
    if model.placement.prompts_both_ways:
        beside["token_type_ids"] = answer_types(mask, [len(one.prompt.input_ids) for one in generations])
    with assistant.with_strengths(generations[0].strengths):
        model.generate(
            ids,
            mask,
            features_of(generations),
            max_new_tokens=max(generation.limit for generation in generations),
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=pad,
            eos_token_id=sorted(generations[0].ends),
            logits_processor=LogitsProcessorList([_OwnChoice(generations, pad)]),
            stopping_criteria=StoppingCriteriaList([_Done(generations)]),
            **beside,
        )
