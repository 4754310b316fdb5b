"""Rows of one model that begin and end together, by transformers' `generate`: for LLMs that remember otherwise than by
keys and values, and for fusions that keep a batch's media between its steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from finetune.model.assistant import Assistant
from finetune.serving.engine.row import Row


class _Chosen(LogitsProcessor):
    """Leaves of each row's scores only the token that the row chooses."""

    def __init__(self, rows: Sequence[Row], pad: int) -> None:
        self.rows, self.pad = rows, pad

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        likeliest = scores.argmax(-1).tolist()
        for number, row in enumerate(self.rows):
            if row.done:
                continue
            if row.choice.plain:
                row.take(likeliest[number])
            else:
                row.choose(scores[number])
            row.tell_end()
        chosen = [row.tokens[-1] if row.tokens else self.pad for row in self.rows]
        kept = torch.full_like(scores, float("-inf"))
        return kept.scatter_(1, torch.tensor(chosen, device=scores.device)[:, None], 0.0)


class _Ended(StoppingCriteria):
    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        for row in self.rows:
            row.look_at_clock()
        return torch.tensor([row.done for row in self.rows], device=input_ids.device)


def generate(assistant: Assistant, rows: Sequence[Row]) -> None:
    """Answer rows of equal `weights`, their media encoded, to their ends. Raises what the model raises."""
    model, pad = assistant.model, assistant.tokenizer.pad_token_id
    device = model.get_input_embeddings().weight.device
    longest = max(row.length for row in rows)
    padding = [longest - row.length for row in rows]
    ids = [[pad] * n + row.prompt.input_ids + row.tokens for n, row in zip(padding, rows, strict=True)]
    features: dict[str, list[Tensor]] = {}
    for row in rows:
        for kind, seen in row.prompt.media.items():
            features.setdefault(kind, []).extend(one.features for one in seen if one.features is not None)
    with assistant.weighing(rows[0].weights):
        model.generate(
            torch.tensor(ids, device=device),
            torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device),
            features,
            max_new_tokens=max(row.limit for row in rows),
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=pad,
            eos_token_id=sorted(rows[0].ends),
            logits_processor=LogitsProcessorList([_Chosen(rows, pad)]),
            stopping_criteria=StoppingCriteriaList([_Ended(rows)]),
        )
