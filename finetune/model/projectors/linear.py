"""One linear layer (LLaVA, Liu et al. 2023, https://arxiv.org/abs/2304.08485)."""

from typing import TYPE_CHECKING

from finetune.common.registry import PartOptions

if TYPE_CHECKING:
    from torch import nn


Options = PartOptions


def build(width_in: int, width_out: int, options: Options) -> "nn.Module":
    from torch import nn

    return nn.Linear(width_in, width_out)


def length(rows: int, options: Options) -> int:
    return rows
