"""Squares of neighbouring patches are concatenated to one wider row, then an MLP: fewer tokens for the LLM without loss
(InternVL 1.5, Chen et al. 2024, https://arxiv.org/abs/2404.16821).
"""

from math import isqrt
from typing import TYPE_CHECKING

from pydantic import Field

from finetune.common.errors import ModelError
from finetune.common.registry import PartOptions

if TYPE_CHECKING:
    import torch
    from torch import nn


class Options(PartOptions):
    factor: int = Field(2, ge=1, description="Side of a square in patches: factor x factor rows become one.")
    hidden: int | None = Field(None, ge=1, description="Width of the MLP's hidden layer; null: that of the LLM.")


def build(width_in: int, width_out: int, options: Options) -> "nn.Module":
    from torch import nn

    class MergeSquares(nn.Module):
        def forward(self, features: "torch.Tensor") -> "torch.Tensor":
            return merge_squares(features, options.factor)

    wide, hidden = width_in * options.factor**2, options.hidden or width_out
    return nn.Sequential(
        MergeSquares(), nn.LayerNorm(wide), nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, width_out)
    )


def length(rows: int, options: Options) -> int:
    side = isqrt(rows)
    if side * side != rows or side % options.factor:
        raise ModelError(
            f"pixel_shuffle: {rows} rows aren't a square grid whose side is a multiple of {options.factor}; choose "
            "another `factor`, or another projector"
        )
    return rows // options.factor**2


def merge_squares(features: "torch.Tensor", factor: int) -> "torch.Tensor":
    """(N, side * side, W) -> (N, (side / factor)^2, factor^2 * W): the patches of a square, row by row."""
    count, rows, width = features.shape
    side = isqrt(rows)
    squares = features.view(count, side // factor, factor, side // factor, factor, width)
    return squares.transpose(2, 3).reshape(count, rows // factor**2, factor**2 * width)
