"""Learned queries attend to the rows: the LLM gets as many tokens as there are queries, whatever the number of rows
(perceiver resampler of Flamingo, Alayrac et al. 2022, https://arxiv.org/abs/2204.14198).
"""

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from finetune.common.registry import PartOptions

if TYPE_CHECKING:
    import torch
    from torch import nn


class Options(PartOptions):
    queries: int = Field(64, ge=1, description="Number of projected rows.")
    layers: int = Field(2, ge=1, description="Number of blocks of attention and MLP.")
    width: int = Field(768, ge=2, description="Inner width; even and a multiple of `heads`.")
    heads: int = Field(8, ge=1, description="Attention heads.")

    @model_validator(mode="after")
    def _divides(self) -> "Options":
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"`width` {self.width} must be even and a multiple of `heads` {self.heads}")
        return self


def build(width_in: int, width_out: int, options: Options) -> "nn.Module":
    import torch
    from torch import nn

    width = options.width

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows_norm, self.queries_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
            self.attention = nn.MultiheadAttention(width, options.heads, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, queries: "torch.Tensor", rows: "torch.Tensor") -> "torch.Tensor":
            normed = self.queries_norm(queries)
            # Queries attend to each other too, so that they can share the rows among themselves.
            context = torch.cat([self.rows_norm(rows), normed], 1)
            queries = queries + self.attention(normed, context, context, need_weights=False)[0]
            result: torch.Tensor = queries + self.mlp(self.mlp_norm(queries))
            return result

    class Resampler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inlet = nn.Sequential(nn.LayerNorm(width_in), nn.Linear(width_in, width))
            self.queries = nn.Parameter(0.02 * torch.randn(options.queries, width))
            self.blocks = nn.ModuleList(Block() for _ in range(options.layers))
            self.outlet = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width_out))

        def forward(self, features: "torch.Tensor") -> "torch.Tensor":
            rows = self.inlet(features)
            rows = rows + positions(rows.shape[1], width).to(rows)
            queries = self.queries.expand(len(rows), -1, -1)
            for block in self.blocks:
                queries = block(queries, rows)
            result: torch.Tensor = self.outlet(queries)
            return result

    return Resampler()


def length(rows: int, options: Options) -> int:
    return options.queries


def positions(rows: int, width: int) -> "torch.Tensor":
    """(rows, width): sines and cosines of the rows' numbers (Vaswani et al. 2017, section 3.5), since attention alone
    ignores their order.
    """
    import torch

    angles = torch.arange(rows)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.cat([angles.sin(), angles.cos()], 1)
