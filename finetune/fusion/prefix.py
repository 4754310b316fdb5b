"""Media stand in the sequence where their placeholder tokens are, as embeddings among embeddings (LLaVA)."""

from typing import TYPE_CHECKING, Any

from finetune.parts import PartOptions

if TYPE_CHECKING:
    import torch
    from torch import nn


class Options(PartOptions):
    pass


def placeholders(rows: int, options: Options) -> int:
    return rows


def build(language_model_config: Any, options: Options) -> "nn.Module":
    from torch import nn

    class Prefix(nn.Module):
        def forward(
            self, embeddings: "torch.Tensor", is_placeholder: "torch.Tensor", media: "torch.Tensor"
        ) -> "torch.Tensor":
            return embeddings.masked_scatter(is_placeholder[..., None], media.to(embeddings.dtype))

    return Prefix()
