"""Projected rows replace the embeddings of their placeholder tokens (LLaVA, Liu et al. 2023,
https://arxiv.org/abs/2304.08485).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.common.registry import PartOptions
from finetune.model.fusion import Projected

if TYPE_CHECKING:
    from torch import Tensor, nn

TRAINED = False
BY_SAMPLE = False


Options = PartOptions


def placeholders(rows: int, options: Options) -> int:
    return rows


def build(language_model_config: Any, names: Sequence[str], options: Options) -> "nn.Module":
    from torch import nn

    class Prefix(nn.Module):
        strength = None

        def forward(self, embeddings: "Tensor", media: Mapping[str, Projected], samples: "Tensor") -> "Tensor":
            for projected in media.values():
                rows = projected.rows.to(embeddings.dtype)
                embeddings = embeddings.masked_scatter(projected.placeholder[..., None], rows)
            return embeddings

        def attach(self, decoder_layers: "nn.ModuleList") -> None:
            """Nothing is added between the layers."""

        def detach_layers(self) -> None:
            """Nothing was attached."""

        def forget(self) -> None:
            """No media are kept."""

    return Prefix()
