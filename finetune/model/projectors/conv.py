"""Strided convolutions along the rows: each projected row blends its neighbourhood, which `stack` concatenates (the
length adaptor between wav2vec 2.0 and mBART, Li et al. 2021, https://arxiv.org/abs/2010.12829).
"""

from math import ceil
from typing import TYPE_CHECKING

from pydantic import Field

from finetune.common.registry import PartOptions

if TYPE_CHECKING:
    import torch
    from torch import nn


class Options(PartOptions):
    kernel: int = Field(3, ge=1, description="Rows that a convolution covers.")
    stride: int = Field(
        2, ge=1, description="Rows between two of its outputs: each layer divides the number of rows by it."
    )
    layers: int = Field(2, ge=1, le=8, description="Number of convolutions: 2 of stride 2 leave a quarter of the rows.")
    hidden: int | None = Field(None, ge=1, description="Width of the convolutions; null: that of the encoder.")


def build(width_in: int, width_out: int, options: Options) -> "nn.Module":
    from torch import nn

    hidden = options.hidden or width_in

    class Convolve(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv1d(width, hidden, options.kernel, options.stride)

        def forward(self, features: "torch.Tensor") -> "torch.Tensor":
            left, right = padding(features.shape[1], options)
            padded = nn.functional.pad(features.transpose(1, 2), (left, right))
            return nn.functional.gelu(self.conv(padded)).transpose(1, 2)

    widths = [width_in] + [hidden] * (options.layers - 1)
    return nn.Sequential(
        nn.LayerNorm(width_in),
        *(Convolve(width) for width in widths),
        nn.LayerNorm(hidden),
        nn.Linear(hidden, width_out),
    )


def length(rows: int, options: Options) -> int:
    for _ in range(options.layers):
        rows = ceil(rows / options.stride)
    return rows


def padding(rows: int, options: Options) -> tuple[int, int]:
    """Zero rows to add before and after, so that ceil(rows / stride) come out."""
    total = max((ceil(rows / options.stride) - 1) * options.stride + options.kernel - rows, 0)
    return total // 2, total - total // 2
