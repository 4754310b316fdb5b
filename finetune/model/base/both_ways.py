"""Where the attention of a base goes both ways: tokens also attend to those behind them.

Shapes:  B rows of a batch   T tokens of a row
"""

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from finetune.model.row_plan import RowPlan


class BothWays(StrEnum):
    """Within each medium, as in Gemma 3; or in whole prompts, as in PaliGemma, and forward only in answers."""

    MEDIA = "media"
    PROMPTS = "prompts"

    @property
    def token_type(self) -> int:
        """The type of tokens that attend both ways, among transformers' `token_type_ids`."""
        return 1 if self is BothWays.MEDIA else 0


def reads_prompts_both_ways(config: Any) -> bool:
    """Whether a model of this config attends both ways in its prompts."""
    return getattr(config.get_text_config(), "use_bidirectional_attention", None) is True


def both_ways_of(model: Any) -> BothWays | None:
    """Of a base; None where its attention is causal."""
    if "token_type_ids" not in signature(model.forward).parameters:
        return None
    return BothWays.PROMPTS if reads_prompts_both_ways(model.config) else BothWays.MEDIA


def answer_types(mask: Tensor, prompts: Sequence[int]) -> Tensor:
    """`token_type_ids` (B, T) of rows with an attention mask (B, T), padded on either side: 0 in a prompt of so many
    tokens, 1 in the answer behind it.
    """
    return (mask.cumsum(-1) > torch.tensor(prompts, device=mask.device)[:, None]).long()


def with_spans(plan: RowPlan, both_ways: BothWays, types: Tensor) -> RowPlan:
    """The plan of a row with these `token_type_ids` (1, T), with the tokens that attend both ways."""
    inside = (types[0] == both_ways.token_type).tolist()
    starts = {segment.begin for segment in plan.segments}
    places = [place for place, one in enumerate(inside) if one]
    begins = [place for place in places if place in starts or not place or not inside[place - 1]]
    last = len(inside) - 1
    ends = [place + 1 for place in places if place + 1 in starts or place == last or not inside[place + 1]]
    return replace(plan, bidirectional=tuple(zip(begins, ends, strict=True)))
