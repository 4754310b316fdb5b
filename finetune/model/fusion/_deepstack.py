"""Features of several depths (DeepStack, Meng et al. 2024, https://arxiv.org/abs/2406.04334), as Qwen3-VL has them:
the first replace the embeddings of their placeholder tokens, the others are added to the states of these tokens after
the decoder's first layers.

Shapes:  B rows of T tokens, D wide; M rows of features, (1 + k) * D wide
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finetune.model.fusion import Projected


class DeepStack(nn.Module):
    strength = None

    def __init__(self) -> None:
        super().__init__()
        self.added: list[tuple[Tensor, tuple[Tensor, ...]]] = []  # of each medium: its tokens (B, T), k times (M, D)
        self.hooks: list[Any] = []

    def forward(self, embeddings: Tensor, media: Mapping[str, Projected], samples: Tensor) -> Tensor:
        self.added = []
        for projected in media.values():
            if not projected.lengths:
                embeddings = embeddings + 0.0 * projected.rows.sum()  # weights that train stay in the graph
                continue
            first, *deeper = projected.rows.to(embeddings.dtype).split(embeddings.shape[-1], 1)
            embeddings = embeddings.masked_scatter(projected.placeholder[..., None], first)
            self.added.append((projected.placeholder, tuple(deeper)))
        return embeddings

    def attach(self, decoder_layers: nn.ModuleList) -> None:
        for number, layer in enumerate(decoder_layers):
            self.hooks.append(layer.register_forward_hook(partial(self._behind, number)))

    def _behind(self, number: int, layer: nn.Module, args: Any, states: Tensor) -> Tensor:
        for tokens, deeper in self.added:
            if number < len(deeper) and tokens.shape == states.shape[:2]:  # others are tokens of an answer
                rows = deeper[number].to(states.device, states.dtype)
                states = states + torch.zeros_like(states).masked_scatter(tokens[..., None], rows)
        return states

    def detach_layers(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()
        self.forget()

    def forget(self) -> None:
        self.added = []
