"""Linear, GELU, linear (LLaVA-1.5, Liu et al. 2023, https://arxiv.org/abs/2310.03744)."""

from typing import TYPE_CHECKING

from pydantic import Field

from finetune.common.registry import PartOptions

if TYPE_CHECKING:
    from torch import nn


class Options(PartOptions):
    hidden: int | None = Field(None, ge=1, description="Width of the hidden layer; null: that of the LLM.")


def build(width_in: int, width_out: int, options: Options) -> "nn.Module":
    from torch import nn

    hidden = options.hidden or width_out
    return nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width_out))


def length(rows: int, options: Options) -> int:
    return rows
