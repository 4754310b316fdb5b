"""Rows of one model that are decoded together: they join between two steps, and leave when they are done.

Rows are padded on the left, so that all go on in the same column. B rows, T columns, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from finetune.model.composite import MultimodalModel
from finetune.serving.engine.cache import KeysValues, PrefixCache
from finetune.serving.engine.row import Row


class Growing(DynamicLayer):
    """Keys and values with empty columns behind them: a step copies none of those that are there. It keeps all columns:
    what a sliding window hides, masks hide.
    """

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None
        if keys is not None and values is not None:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, new columns, width) -> those of all columns."""
        if self.keys is None or self.values is None:  # a prompt, read for the first time
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self._room is None or end > self._room[0].shape[2]:
            self._room = (_with_room(self.keys, end), _with_room(self.values, end))
        keys, values = self._room
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values


class Batch:
    """Newcomers, their media encoded, are read by `join`; `step` gives each row one more token."""

    def __init__(self, model: MultimodalModel, prefixes: PrefixCache) -> None:
        self.rows: list[Row] = []
        self._model, self._prefixes = model, prefixes
        parameters = signature(model.causal_lm.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._device = model.get_input_embeddings().weight.device
        self._cache = _cache([])
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=self._device)

    @torch.no_grad()
    def join(self, newcomers: Sequence[Row]) -> None:
        """Read newcomers' prompts (and what they have said before they were put back), and go on with them, too."""
        rows = list(newcomers)
        for row in rows:
            row.block_names = self._prefixes.names(row.request.model, row.prompt.symbols)
        known = [min(self._prefixes.length(row.block_names), row.length - 1) for row in rows]
        # All read equally many columns now; of what is longer, the rest comes from the prefix cache.
        now = max(row.length - n for row, n in zip(rows, known, strict=True))
        known = [max(0, row.length - now) for row in rows]
        found = [self._prefixes.read(row.block_names, n) for row, n in zip(rows, known, strict=True)]
        if any(n and not blocks for n, blocks in zip(known, found, strict=True)):  # given up in the meantime
            now, known, found = max(row.length for row in rows), [0] * len(rows), [[] for _ in rows]
        columns = max(row.length for row in rows)
        mask = self._mask_of([columns - row.length for row in rows], columns)
        embeddings = self._embed(rows, columns)[:, -now:]
        cache = _cache(_beside(found, columns - now))
        logits = self._run(cache, mask, inputs_embeds=embeddings)
        memory = [(layer.keys, layer.values) for layer in cache.layers]
        for number, (row, n) in enumerate(zip(rows, known, strict=True)):
            row.stream.cached_tokens = row.stream.cached_tokens if row.tokens else n
            self._prefixes.write(row.block_names, memory, number, columns - row.length)
        self._add(rows, memory, mask)
        self._choose(rows, logits)

    @torch.no_grad()
    def step(self) -> None:
        """One more token for every row."""
        ids = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self._device)
        mask = functional.pad(self._mask, (0, 1), value=1)
        logits = self._run(self._cache, mask, input_ids=ids)
        self._mask = mask
        self._choose(self.rows, logits)

    def keep(self, rows: Sequence[Row]) -> None:
        """Let go of all other rows, and of the columns that only they needed."""
        if len(rows) == len(self.rows):
            return
        if not rows:
            self.clear()
            return
        places = torch.tensor([self.rows.index(row) for row in rows], device=self._device, dtype=torch.long)
        mask = self._mask[places]
        empty = int(mask.any(0).int().argmax())
        # Memory may not hold both the old and the new: until all is there, nothing has changed.
        cache = _cache(
            [(layer.keys[places, :, empty:], layer.values[places, :, empty:]) for layer in self._cache.layers]
        )
        self.rows, self._mask, self._cache = list(rows), mask[:, empty:], cache

    def clear(self) -> None:
        """Let go of all rows. It needs no memory."""
        self.rows, self._mask, self._cache = [], self._mask.new_empty(0, 0), _cache([])

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Logits (B, V) -> each row's next token."""
        likeliest = logits.argmax(-1).tolist()
        for number, row in enumerate(rows):
            if row.choice.plain:
                row.take(likeliest[number])
            else:
                row.choose(logits[number])

    def _run(self, cache: Cache, mask: Tensor, **inputs: Tensor) -> Tensor:
        """Logits (B, V) behind the last column; the cache then holds all columns."""
        (given,) = inputs.values()
        if self._takes_positions:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -given.shape[1] :]
            inputs["position_ids"] = positions
        lm = self._model.causal_lm
        output = lm(attention_mask=mask, past_key_values=cache, use_cache=True, **inputs, **self._last_only)
        return output.logits[:, -1]

    def _embed(self, rows: Sequence[Row], columns: int) -> Tensor:
        """(B, T, D), padded on the left; pictures of all rows in the rows' order."""
        ids = [[0] * (columns - row.length) + row.prompt.input_ids + row.tokens for row in rows]
        media: dict[str, list[Tensor]] = {}
        for row in rows:
            for kind, seen in row.prompt.media.items():
                media.setdefault(kind, []).extend(one.features for one in seen if one.features is not None)
        return self._model.embed(torch.tensor(ids, device=self._device), media)

    def _mask_of(self, padding: Sequence[int], columns: int) -> Tensor:
        at = torch.arange(columns, device=self._device)
        return (at >= torch.tensor(padding, device=self._device)[:, None]).long()

    def _add(self, rows: Sequence[Row], memory: KeysValues, mask: Tensor) -> None:
        missing = mask.shape[1] - self._mask.shape[1]
        if self.rows:
            mine, new = (max(0, missing), 0), (max(0, -missing), 0)
            mask = torch.cat([functional.pad(self._mask, mine), functional.pad(mask, new)])
            memory = [
                (_stacked(layer.keys, key, mine, new), _stacked(layer.values, value, mine, new))
                for layer, (key, value) in zip(self._cache.layers, memory, strict=True)
            ]
        self._mask, self._cache = mask, _cache(memory)
        self.rows = [*self.rows, *rows]


def _cache(memory: KeysValues) -> Any:
    """A cache that goes on behind `memory`."""
    if not memory:
        return Cache(layer_class_to_replicate=Growing)
    return Cache(layers=[Growing(keys, values) for keys, values in memory])


def _with_room(tensor: Tensor, columns: int) -> Tensor:
    """The same, (B, heads, T, width), with room for `columns` and a quarter more."""
    grown = tensor.new_empty(*tensor.shape[:2], columns + max(32, columns // 4), tensor.shape[3])
    grown[:, :, : tensor.shape[2]] = tensor
    return grown


def _stacked(old: Tensor, new: Tensor, before_old: tuple[int, int], before_new: tuple[int, int]) -> Tensor:
    """(B, heads, T, width) below each other, each with empty columns before it."""
    return torch.cat([functional.pad(old, (0, 0, *before_old)), functional.pad(new, (0, 0, *before_new))])


def _beside(found: Sequence[Sequence[Tensor]], columns: int) -> KeysValues:
    """What the prefix cache gave for each row, [] or (heads, tokens, width) of each layer, as one memory."""
    like = next((blocks for blocks in found if blocks), None)
    if like is None:
        return []
    stacked = []
    for number, one in enumerate(like):
        rows = [blocks[number] if blocks else one[:, :0] for blocks in found]
        stacked.append(torch.stack([functional.pad(row, (0, 0, columns - row.shape[1], 0)) for row in rows]))
    return list(zip(stacked[::2], stacked[1::2], strict=True))
