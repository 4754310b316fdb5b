"""The modules of `cross_attention`, which imports torch only when it builds them.

Shapes: B rows of T tokens, D wide; M rows of media of one kind; K samples with media.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.model.fusion import Projected


class Attention(nn.Module):
    """Queries from the text, keys and values from one kind of media."""

    def __init__(self, width: int, heads: int, head_width: int, gate: float) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads = (heads, head_width)
        self.norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key_value = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.gate = nn.Parameter(torch.tensor(gate))

    def forward(self, tokens: Tensor, rows: Tensor, members: Tensor, visible: Tensor) -> Tensor:
        """Tokens (K, T, D) of K samples, all media (M, D), the indices of each sample's media (K, L), and whether a
        token attends to them (K, T, L) -> (K, T, D), float32.
        """
        query = self.query(self.norm(tokens)).unflatten(-1, self.heads).transpose(1, 2)
        key, value = self.key_value(rows)[members].chunk(2, dim=-1)
        key, value = (x.unflatten(-1, self.heads).transpose(1, 2) for x in (key, value))
        any_visible = visible.any(-1, keepdim=True)
        # A softmax over nothing is NaN: a token before all media attends to everything, then is multiplied by zero.
        mask = (visible | ~any_visible)[:, None]
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        result: Tensor = self.out(attended.transpose(1, 2).flatten(2)) * any_visible * torch.tanh(self.gate)
        return result


class CrossAttention(nn.Module):
    """`blocks`: an `Attention` per medium, put before every `every`-th layer; `strength`: {medium: factor}."""

    def __init__(self, blocks: nn.ModuleList, every: int, strength: dict[str, float]) -> None:
        super().__init__()
        self.blocks: Any = blocks
        self.every = every
        # Rows carry the number of their segment, so that the order of frames and tiles is known.
        self.order = nn.Parameter(torch.tensor(0.1))
        self.strength = strength
        self.media: dict[str, _MediaBySample] = {}
        self.hooks: list[Any] = []

    def attach(self, decoder_layers: nn.ModuleList) -> None:
        first = min(self.every, len(decoder_layers)) - 1
        for number, layer in enumerate(decoder_layers[first :: self.every]):
            # When a model is copied, a partial of a method is rebound to the copy; a closure isn't.
            self.hooks.append(layer.register_forward_pre_hook(partial(self._before, number), with_kwargs=True))

    def detach_layers(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()
        self.forget()

    def forward(self, embeddings: Tensor, media: Mapping[str, Projected], samples: Tensor) -> Tensor:
        self.media = {}
        for name, projected in media.items():
            embeddings = embeddings.masked_fill(projected.placeholder[..., None], 0.0)
            if not projected.lengths:  # keep the weights in the graph, so that all processes reduce the same ones
                trained = [p for block in self.blocks for p in block[name].parameters() if p.requires_grad]
                zero = sum((0.0 * p.sum() for p in trained), projected.rows.sum() + 0.0 * self.order)
                embeddings = embeddings + zero.to(embeddings.dtype)
                continue
            by_sample = _group_by_sample(projected, samples)
            width = projected.rows.shape[1]
            order = self.order * _sinusoid(by_sample.segments, width)
            self.media[name] = replace(by_sample, rows=functional.rms_norm(projected.rows, (width,)) + order)
        return embeddings

    def forget(self) -> None:
        self.media = {}

    def _before(self, number: int, layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if not self.media:
            return None
        if arguments:
            return (self._add(self.blocks[number], arguments[0]), *arguments[1:]), keywords
        return arguments, {**keywords, "hidden_states": self._add(self.blocks[number], keywords["hidden_states"])}

    def _add(self, block: Any, hidden: Tensor) -> Tensor:
        # Activation checkpointing repeats this in the backward pass: `media` must outlive the forward pass.
        for name, media in self.media.items():
            if self.strength[name] == 0 and not torch.is_grad_enabled():  # in training, all processes need all
                continue
            row, columns, members, visible = media.for_states(hidden)
            with torch.autocast(hidden.device.type, enabled=False):
                added = block[name](hidden[row, columns].float(), media.rows, members, visible)
            added = (self.strength[name] * added).to(hidden.dtype)
            hidden = hidden.index_put((row, columns), added, accumulate=True)
        return hidden


@dataclass(frozen=True)
class _MediaBySample:
    """Media of one kind, grouped so that tokens are compared with those of their own sample alone: K samples have
    media, with at most T tokens and L rows of media. Padding attends to nothing, and nothing attends to it.
    """

    rows: Tensor  # (M, D): the media of all samples
    segments: Tensor  # (M,): the number of a row's segment in its sample
    batch: int  # rows of the batch
    width: int  # tokens per row of the batch
    row: Tensor  # (K, 1): the row of the batch that holds a sample
    columns: Tensor  # (K, T): its tokens in that row
    members: Tensor  # (K, L): its media, as indices of `rows`
    visible: Tensor  # (K, T, L): whether a token attends to a row of media

    def for_states(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(row, columns, members, visible) for hidden states (B, T, D) of the batch or of tokens generated after it;
        B is a multiple of `batch` in a beam search.
        """
        row, columns, members, visible = self.row, self.columns, self.members, self.visible
        if hidden.shape[1] != self.width:  # generated tokens attend to what the prompt's last one attends to
            columns = torch.arange(hidden.shape[1], device=row.device).expand(len(row), -1)
            visible = visible[:, -1:].expand(-1, hidden.shape[1], -1)
        if (beams := len(hidden) // self.batch) > 1:
            columns, members, visible = (x.repeat_interleave(beams, 0) for x in (columns, members, visible))
            row = (row * beams + torch.arange(beams, device=row.device)).reshape(-1, 1)
        return row, columns, members, visible


def _group_by_sample(projected: Projected, samples: Tensor) -> _MediaBySample:
    """`samples`, int (B, T): the number of a token's packed sample. Samples are contiguous in a row."""
    device, width = samples.device, samples.shape[1]
    places = projected.placeholder.nonzero()  # (segments, 2): row, column
    owner_of_segment = places[:, 0] * (width + 1) + samples[places[:, 0], places[:, 1]]
    _, owner, segments = torch.unique_consecutive(owner_of_segment, return_inverse=True, return_counts=True)
    lengths = torch.tensor(projected.lengths, device=device)
    number = torch.arange(len(places), device=device) - (segments.cumsum(0) - segments)[owner]
    # For each sample: its row of the batch, its tokens, its media.
    first = places[segments.cumsum(0) - segments]
    row = first[:, :1]
    inside = samples[row[:, 0]] == samples[first[:, 0], first[:, 1]][:, None]
    columns, is_token = _ranges(inside.int().argmax(1), inside.sum(1), width)
    media = torch.zeros(len(segments), dtype=torch.long, device=device).index_add(0, owner, lengths)
    members, is_medium = _ranges(media.cumsum(0) - media, media, len(projected.rows))
    column_of_row = places[:, 1].repeat_interleave(lengths)
    visible = columns[:, :, None] >= column_of_row[members][:, None, :]
    visible = visible & is_token[:, :, None] & is_medium[:, None, :]
    segments_of_rows = number.repeat_interleave(lengths)
    return _MediaBySample(projected.rows, segments_of_rows, len(samples), width, row, columns, members, visible)


def _ranges(starts: Tensor, lengths: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Indices (K, longest) from each start on, below `end`, and whether they are within its length."""
    steps = torch.arange(int(lengths.max()), device=starts.device)
    return (starts[:, None] + steps).clamp(max=end - 1), steps < lengths[:, None]


def _sinusoid(numbers: Tensor, width: int) -> Tensor:
    """Numbers (S,) -> (S, width): sines and cosines (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762)."""
    half = -(-width // 2)
    rates = torch.exp(torch.arange(half, device=numbers.device) * (-9.21 / half))
    angles = numbers[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]
