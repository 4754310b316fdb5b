"""Neighbouring rows are concatenated to one wider row, then a gated MLP between norms: fewer tokens per second of sound
(Ultravox, https://github.com/fixie-ai/ultravox; SwiGLU: Shazeer 2020, https://arxiv.org/abs/2002.05202).
"""

from math import ceil
from typing import TYPE_CHECKING

from pydantic import Field

from finetune.common.registry import PartOptions

if TYPE_CHECKING:
    import torch
    from torch import nn


class Options(PartOptions):
    factor: int = Field(8, ge=1, description="Rows that become one: 8 leave 6.25 of Whisper's 50 per second.")
    hidden: int | None = Field(None, ge=1, description="Width of the gated hidden layer; null: that of the LLM.")


def build(width_in: int, width_out: int, options: Options) -> "nn.Module":
    from torch import nn

    class StackRows(nn.Module):
        def forward(self, features: "torch.Tensor") -> "torch.Tensor":
            return stack_rows(features, options.factor)

    class SwiGLU(nn.Module):
        def forward(self, wide: "torch.Tensor") -> "torch.Tensor":
            value, gate = wide.chunk(2, -1)
            return nn.functional.silu(gate) * value

    wide, hidden = width_in * options.factor, options.hidden or width_out
    before, between = nn.RMSNorm(wide, eps=1e-6), nn.RMSNorm(hidden, eps=1e-6)
    for norm in (before, between):
        nn.init.constant_(norm.weight, 0.4)  # as in Ultravox: the projected rows are small at first
    return nn.Sequential(
        StackRows(),
        before,
        nn.Linear(wide, 2 * hidden, bias=False),
        SwiGLU(),
        between,
        nn.Linear(hidden, width_out, bias=False),
    )


def length(rows: int, options: Options) -> int:
    return ceil(rows / options.factor)


def stack_rows(features: "torch.Tensor", factor: int) -> "torch.Tensor":
    """(N, L, W) -> (N, ceil(L / factor), factor * W); zeros fill the last row."""
    from torch.nn.functional import pad

    count, rows, width = features.shape
    return pad(features, (0, 0, 0, -rows % factor)).reshape(count, ceil(rows / factor), factor * width)
