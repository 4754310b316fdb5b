"""Gated blocks between the decoder's layers: the text asks (Q), the media answer (K, V), and what they say is added
times tanh(gate) times `strength` (Flamingo, Alayrac et al. 2022, https://arxiv.org/abs/2204.14198).

A segment (a picture, a frame, a recording) is one placeholder token in the text, embedded as zeros. A token sees the
media of its own sample that stand before it. At strength 0, and before training, the LLM is left exactly as it was.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field

from finetune.errors import ModelError
from finetune.fusion import Projected
from finetune.parts import PartOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

TRAINED = True


class Options(PartOptions):
    every: int = Field(2, ge=1, description="One block before every n-th layer of the LLM.")
    heads: int = Field(8, ge=1, description="Attention heads of a block.")
    head_width: int = Field(64, ge=1, description="Numbers per head.")
    gate: float = Field(0.0, description="Every gate before training; blocks add tanh(gate) times what they find.")
    strength: float | dict[str, float] = Field(
        1.0, description="Factor of what media add, or one per medium; 0: the text-only LLM. May be set anew later."
    )


def placeholders(rows: int, options: Options) -> int:
    return 1


def build(language_model_config: Any, names: Sequence[str], options: Options) -> "nn.Module":
    import torch
    from torch import nn
    from torch.nn import functional

    width, inner = language_model_config.hidden_size, options.heads * options.head_width

    class Attention(nn.Module):
        """Q from the text, K and V from one kind of media."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(width)
            self.query = nn.Linear(width, inner, bias=False)
            self.key_value = nn.Linear(width, 2 * inner, bias=False)
            self.out = nn.Linear(inner, width, bias=False)
            self.gate = nn.Parameter(torch.tensor(options.gate))

        def forward(self, hidden: "Tensor", rows: "Tensor", visible: "Tensor") -> "Tensor":
            """Hidden states (B, T, D), media (M, D), which of them a token sees (B, T, M) -> (B, T, D), float32."""
            heads = (options.heads, options.head_width)
            query = self.query(self.norm(hidden)).unflatten(-1, heads).transpose(1, 2)
            key, value = self.key_value(rows)[None].chunk(2, dim=-1)
            key, value = (x.unflatten(-1, heads).transpose(1, 2).expand(len(hidden), -1, -1, -1) for x in (key, value))
            sees_any = visible.any(-1, keepdim=True)
            # A token that sees nothing attends to everything, and is then multiplied by zero: no softmax over nothing.
            mask = (visible | ~sees_any)[:, None]
            found = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            return self.out(found.transpose(1, 2).flatten(2)) * sees_any * torch.tanh(self.gate)

    class CrossAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            count = max(1, language_model_config.num_hidden_layers // options.every)
            self.blocks: Any = nn.ModuleList(nn.ModuleDict({name: Attention() for name in names}) for _ in range(count))
            # Of several frames or tiles, which is the first? Rows of a segment carry its number.
            self.order = nn.Parameter(torch.tensor(0.1))
            given = options.strength if isinstance(options.strength, dict) else dict.fromkeys(names, options.strength)
            if unknown := given.keys() - set(names):
                raise ModelError(
                    f"fusion.strength: {', '.join(unknown)}: no such medium; there are: {', '.join(names)}"
                )
            self.strength = dict.fromkeys(names, 1.0) | given
            self.seen: dict[str, tuple[Tensor, Tensor]] = {}

        def attach(self, decoder_layers: "nn.ModuleList") -> None:
            first = min(options.every, len(decoder_layers)) - 1
            for number, layer in enumerate(decoder_layers[first :: options.every]):
                # A partial of a method, unlike a closure, is copied together with a model that is copied.
                layer.register_forward_pre_hook(partial(self._before, number), with_kwargs=True)

        def forward(self, embeddings: "Tensor", media: Mapping[str, Projected], samples: "Tensor") -> "Tensor":
            self.seen = {}
            for name, found in media.items():
                embeddings = embeddings.masked_fill(found.placeholder[..., None], 0.0)
                if not found.lengths:  # keep the weights in the graph, so that all processes reduce the same ones
                    used = [p for block in self.blocks for p in block[name].parameters() if p.requires_grad]
                    idle = sum((0.0 * p.sum() for p in used), found.rows.sum() + 0.0 * self.order)
                    embeddings = embeddings + idle.to(embeddings.dtype)
                    continue
                places = found.placeholder.nonzero()  # (segments, 2): row, column
                lengths = torch.tensor(found.lengths, device=places.device)
                row, column = places.repeat_interleave(lengths, 0).unbind(1)
                sample = samples[places[:, 0], places[:, 1]]
                tokens = torch.arange(samples.shape[1], device=places.device)
                visible = (samples[..., None] == samples[row, column]) & (tokens[None, :, None] >= column)
                visible &= torch.arange(len(samples), device=places.device)[:, None, None] == row
                number = _number_in_run(places[:, 0] * (samples.max() + 1) + sample)
                order = self.order * _sinusoid(number, width).repeat_interleave(lengths, 0)
                self.seen[name] = functional.rms_norm(found.rows, (width,)) + order, visible
            return embeddings

        def forget(self) -> None:
            self.seen = {}

        def _before(self, number: int, layer: "nn.Module", arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            if not self.seen:
                return None
            if arguments:
                return (self._add(self.blocks[number], arguments[0]), *arguments[1:]), keywords
            return arguments, {**keywords, "hidden_states": self._add(self.blocks[number], keywords["hidden_states"])}

        def _add(self, block: Any, hidden: "Tensor") -> "Tensor":
            # Activation checkpoints run this again in the backward pass: `seen` must then still be that of the batch.
            for name, (rows, visible) in self.seen.items():
                if self.strength[name] == 0:
                    continue
                if hidden.shape[1] != visible.shape[1]:  # new tokens see what the prompt's last one sees
                    visible = visible[:, -1:].expand(-1, hidden.shape[1], -1)
                visible = visible.repeat_interleave(len(hidden) // len(visible), 0)  # several beams
                with torch.autocast(hidden.device.type, enabled=False):
                    added = block[name](hidden.float(), rows, visible)
                hidden = hidden + (self.strength[name] * added).to(hidden.dtype)
            return hidden

    return CrossAttention()


def _number_in_run(keys: "Tensor") -> "Tensor":
    """0, 1, 2, ... over equal neighbours: the number of a segment in its sample."""
    import torch

    places = torch.arange(len(keys), device=keys.device)
    begins = torch.cat([keys.new_ones(1, dtype=torch.bool), keys[1:] != keys[:-1]])
    return places - torch.where(begins, places, 0).cummax(0).values


def _sinusoid(numbers: "Tensor", width: int) -> "Tensor":
    """Numbers (S,) -> (S, width): sines and cosines (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762)."""
    import torch

    half = -(-width // 2)
    rates = torch.exp(torch.arange(half, device=numbers.device) * (-9.21 / half))
    angles = numbers[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]
