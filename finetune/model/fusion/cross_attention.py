"""Gated blocks between the decoder's layers: the text asks (Q), the media answer (K, V), and what they say is added
times tanh(gate) times `strength` (Flamingo, Alayrac et al. 2022, https://arxiv.org/abs/2204.14198).

A segment (a picture, a frame, a recording) is one placeholder token in the text, embedded as zeros. A token sees the
media of its own sample that stand before it. At strength 0, and before training, the LLM is left exactly as it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from finetune.common.errors import ModelError
from finetune.common.registry import PartOptions
from finetune.model.fusion import Projected

if TYPE_CHECKING:
    from torch import Tensor, nn

TRAINED = True
Strength = Annotated[float, Field(ge=0)]


class Options(PartOptions):
    every: int = Field(2, ge=1, description="One block before every n-th layer of the LLM.")
    heads: int = Field(8, ge=1, description="Attention heads of a block.")
    head_width: int = Field(64, ge=1, description="Numbers per head.")
    gate: float = Field(0.0, description="Every gate before training; blocks add tanh(gate) times what they find.")
    strength: Strength | dict[str, Strength] = Field(
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

        def forward(self, tokens: "Tensor", rows: "Tensor", own: "Tensor", visible: "Tensor") -> "Tensor":
            """Tokens (K, T, D), media (M, D), which of them each of K samples has (K, L), and which of these a token
            sees (K, T, L) -> (K, T, D), float32.
            """
            heads = (options.heads, options.head_width)
            query = self.query(self.norm(tokens)).unflatten(-1, heads).transpose(1, 2)
            key, value = self.key_value(rows)[own].chunk(2, dim=-1)
            key, value = (x.unflatten(-1, heads).transpose(1, 2) for x in (key, value))
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
            self.seen: dict[str, _Seen] = {}
            self.hooks: list[Any] = []

        def attach(self, decoder_layers: "nn.ModuleList") -> None:
            first = min(options.every, len(decoder_layers)) - 1
            for number, layer in enumerate(decoder_layers[first :: options.every]):
                # A partial of a method, unlike a closure, is copied together with a model that is copied.
                self.hooks.append(layer.register_forward_pre_hook(partial(self._before, number), with_kwargs=True))

        def detach_layers(self) -> None:
            while self.hooks:
                self.hooks.pop().remove()
            self.forget()

        def forward(self, embeddings: "Tensor", media: Mapping[str, Projected], samples: "Tensor") -> "Tensor":
            self.seen = {}
            for name, found in media.items():
                embeddings = embeddings.masked_fill(found.placeholder[..., None], 0.0)
                if not found.lengths:  # keep the weights in the graph, so that all processes reduce the same ones
                    used = [p for block in self.blocks for p in block[name].parameters() if p.requires_grad]
                    idle = sum((0.0 * p.sum() for p in used), found.rows.sum() + 0.0 * self.order)
                    embeddings = embeddings + idle.to(embeddings.dtype)
                    continue
                seen = _lay_out(found, samples)
                order = self.order * _sinusoid(seen.numbers, width)
                self.seen[name] = replace(seen, rows=functional.rms_norm(found.rows, (width,)) + order)
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
            for name, seen in self.seen.items():
                if self.strength[name] == 0 and not torch.is_grad_enabled():  # in training all processes reach all
                    continue
                row, columns, own, visible = seen.of(hidden)
                with torch.autocast(hidden.device.type, enabled=False):
                    added = block[name](hidden[row, columns].float(), seen.rows, own, visible)
                added = (self.strength[name] * added).to(hidden.dtype)
                hidden = hidden.index_put((row, columns), added, accumulate=True)
            return hidden

    return CrossAttention()


@dataclass(frozen=True)
class _Seen:
    """Media of one kind, sample by sample: K samples of a batch have some, with at most T tokens and L rows of media,
    so that none is compared with another's. What is short is filled up, and sees and is seen by nothing.
    """

    rows: "Tensor"  # (M, D): all samples' media
    numbers: "Tensor"  # (M,): of the segment that a row belongs to, in its sample
    batch: int  # rows of the batch
    width: int  # tokens of each
    row: "Tensor"  # (K, 1): where a sample stands in the batch
    columns: "Tensor"  # (K, T): its tokens
    own: "Tensor"  # (K, L): its media, into `rows`
    visible: "Tensor"  # (K, T, L)

    def of(self, hidden: "Tensor") -> tuple["Tensor", "Tensor", "Tensor", "Tensor"]:
        """row, columns, own, visible: for hidden states of the batch, or of new tokens behind it; of several beams."""
        import torch

        row, columns, own, visible = self.row, self.columns, self.own, self.visible
        if hidden.shape[1] != self.width:  # new tokens see what the prompt's last one sees
            columns = torch.arange(hidden.shape[1], device=row.device).expand(len(row), -1)
            visible = visible[:, -1:].expand(-1, hidden.shape[1], -1)
        if (beams := len(hidden) // self.batch) > 1:
            columns, own, visible = (x.repeat_interleave(beams, 0) for x in (columns, own, visible))
            row = (row * beams + torch.arange(beams, device=row.device)).reshape(-1, 1)
        return row, columns, own, visible


def _lay_out(found: Projected, samples: "Tensor") -> _Seen:
    """`samples` (B, T): of which packed sample a token is. Placeholders stand row by row, sample by sample."""
    import torch

    device, width = samples.device, samples.shape[1]
    places = found.placeholder.nonzero()  # (segments, 2): row, column
    owner_of_segment = places[:, 0] * (width + 1) + samples[places[:, 0], places[:, 1]]
    _, owner, segments = torch.unique_consecutive(owner_of_segment, return_inverse=True, return_counts=True)
    lengths = torch.tensor(found.lengths, device=device)
    number = torch.arange(len(places), device=device) - (segments.cumsum(0) - segments)[owner]
    # Of each sample: the row that it stands in, its tokens, its media.
    first = places[segments.cumsum(0) - segments]
    row = first[:, :1]
    inside = samples[row[:, 0]] == samples[first[:, 0], first[:, 1]][:, None]
    columns, is_token = _filled(inside.int().argmax(1), inside.sum(1), width)
    media = torch.zeros(len(segments), dtype=torch.long, device=device).index_add(0, owner, lengths)
    own, is_medium = _filled(media.cumsum(0) - media, media, len(found.rows))
    column_of_row = places[:, 1].repeat_interleave(lengths)
    visible = columns[:, :, None] >= column_of_row[own][:, None, :]
    visible = visible & is_token[:, :, None] & is_medium[:, None, :]
    return _Seen(found.rows, number.repeat_interleave(lengths), len(samples), width, row, columns, own, visible)


def _filled(starts: "Tensor", lengths: "Tensor", end: int) -> tuple["Tensor", "Tensor"]:
    """(K, longest): start, start + 1, ... of each, and which of these belong to it."""
    import torch

    steps = torch.arange(int(lengths.max()), device=starts.device)
    return (starts[:, None] + steps).clamp(max=end - 1), steps < lengths[:, None]


def _sinusoid(numbers: "Tensor", width: int) -> "Tensor":
    """Numbers (S,) -> (S, width): sines and cosines (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762)."""
    import torch

    half = -(-width // 2)
    rates = torch.exp(torch.arange(half, device=numbers.device) * (-9.21 / half))
    angles = numbers[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]
