"""Continuous batching: answers of one model join between two steps and leave when they are done.

Padded on the left, so that all continue in the same column. B answers, T columns, V tokens of the vocabulary, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from finetune.model.composite import MultimodalModel
from finetune.model.padding import left_padded
from finetune.serving.engine.cache import KeysValues, PrefixCache
from finetune.serving.engine.generation import Generation, choose_tokens, features_of


class PreallocatedLayer(DynamicLayer):
    """Keys and values with spare columns at the end: a step copies none of the earlier ones. All columns are kept;
    the attention mask hides those outside a sliding window.
    """

    _buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, new columns, width) -> those of all columns, (B, heads, T, width)."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self._buffers is None or end > self._buffers[0].shape[2]:
            self._buffers = (_with_spare_columns(self.keys, end), _with_spare_columns(self.values, end))
        keys, values = self._buffers
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values


class GenerationBatch:
    """`join` reads the prompts of new answers, their media encoded; `step` gives each answer one more token."""

    def __init__(self, model: MultimodalModel, prefixes: PrefixCache) -> None:
        self.generations: list[Generation] = []
        self._model, self._prefixes = model, prefixes
        self._takes_positions = model.llm_takes("position_ids")
        self._last_only = {"logits_to_keep": 1} if model.llm_takes("logits_to_keep") else {}
        self._device = model.get_input_embeddings().weight.device
        self._cache = _cache([])
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=self._device)

    @torch.no_grad()
    def join(self, newcomers: Sequence[Generation]) -> None:
        """Read the prompts of new answers, and the tokens that they had before they were put back, and go on with all.

        All are read in the same number of columns; the prefix cache supplies the rest of the longer ones.
        """
        new = list(newcomers)
        for one in new:
            one.cache_keys = self._prefixes.keys(one.request.model, one.prompt.symbols)
        longest = max(one.length for one in new)
        cached = [min(self._prefixes.length(one.cache_keys), one.length - 1) for one in new]
        columns = max(one.length - n for one, n in zip(new, cached, strict=True))
        cached = [max(0, one.length - columns) for one in new]
        blocks = [self._prefixes.read(one.cache_keys, n) for one, n in zip(new, cached, strict=True)]
        if any(n and not block for n, block in zip(cached, blocks, strict=True)):  # evicted in the meantime
            columns, cached, blocks = longest, [0] * len(new), [[] for _ in new]
        ids, mask = left_padded([one.input_ids for one in new], 0, self._device)
        embeddings = self._model.embed(ids, features_of(new))[:, -columns:]
        cache = _cache(_prefix_memory(blocks, longest - columns))
        logits = self._forward(cache, mask, inputs_embeds=embeddings)
        memory = _memory(cache)
        for number, (one, n) in enumerate(zip(new, cached, strict=True)):
            if not one.tokens:
                one.stream.cached_tokens = n
            self._prefixes.write(one.cache_keys, memory, number, longest - one.length)
        self._append(new, memory, mask)
        choose_tokens(new, logits)

    @torch.no_grad()
    def step(self) -> None:
        """One more token for every answer."""
        ids = torch.tensor([[one.tokens[-1]] for one in self.generations], device=self._device)
        mask = functional.pad(self._mask, (0, 1), value=1)
        logits = self._forward(self._cache, mask, input_ids=ids)
        self._mask = mask
        choose_tokens(self.generations, logits)

    def keep(self, generations: Sequence[Generation]) -> None:
        """Remove all others, and the columns that only they needed."""
        if len(generations) == len(self.generations):
            return
        if not generations:
            self.clear()
            return
        rows = torch.tensor([self.generations.index(one) for one in generations], device=self._device, dtype=torch.long)
        mask = self._mask[rows]
        empty = int(mask.any(0).int().argmax())
        # This may run out of memory: nothing is assigned before everything has been copied.
        cache = _cache([(keys[rows, :, empty:], values[rows, :, empty:]) for keys, values in _memory(self._cache)])
        self.generations, self._mask, self._cache = list(generations), mask[:, empty:], cache

    def clear(self) -> None:
        """Remove all, without allocating memory."""
        self.generations, self._mask, self._cache = [], self._mask.new_empty(0, 0), _cache([])

    def _forward(self, cache: Cache, mask: Tensor, **inputs: Tensor) -> Tensor:
        """Logits (B, V) of the last column; `cache` then holds all columns."""
        (tokens,) = inputs.values()
        if self._takes_positions:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        lm = self._model.causal_lm
        output = lm(attention_mask=mask, past_key_values=cache, use_cache=True, **inputs, **self._last_only)
        result: Tensor = output.logits[:, -1]
        return result

    def _append(self, newcomers: Sequence[Generation], memory: KeysValues, mask: Tensor) -> None:
        missing = mask.shape[1] - self._mask.shape[1]
        if self.generations:
            before_old, before_new = (max(0, missing), 0), (max(0, -missing), 0)
            mask = torch.cat([functional.pad(self._mask, before_old), functional.pad(mask, before_new)])
            memory = [
                (_stacked(old[0], new[0], before_old, before_new), _stacked(old[1], new[1], before_old, before_new))
                for old, new in zip(_memory(self._cache), memory, strict=True)
            ]
        self._mask, self._cache = mask, _cache(memory)
        self.generations = [*self.generations, *newcomers]


def _cache(memory: KeysValues) -> Cache:
    cache = Cache(layer_class_to_replicate=PreallocatedLayer)
    for number, (keys, values) in enumerate(memory):
        cache.update(keys, values, number)
    return cache


def _memory(cache: Cache) -> KeysValues:
    layers: Any = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def _with_spare_columns(tensor: Tensor, columns: int) -> Tensor:
    """A copy of (B, heads, T, width) with space for `columns` and a quarter more."""
    larger = tensor.new_empty(*tensor.shape[:2], columns + max(32, columns // 4), tensor.shape[3])
    larger[:, :, : tensor.shape[2]] = tensor
    return larger


def _stacked(old: Tensor, new: Tensor, before_old: tuple[int, int], before_new: tuple[int, int]) -> Tensor:
    """Two batches (B, heads, T, width) as one, each with empty columns before it."""
    return torch.cat([functional.pad(old, (0, 0, *before_old)), functional.pad(new, (0, 0, *before_new))])


def _prefix_memory(blocks: Sequence[Sequence[Tensor]], columns: int) -> KeysValues:
    """For each answer what `PrefixCache.read` gave, right-aligned in `columns`; [] if there is nothing for any."""
    first = next((layers for layers in blocks if layers), None)
    if first is None:
        return []
    stacked = []
    for number, tensor in enumerate(first):
        rows = [layers[number] if layers else tensor[:, :0] for layers in blocks]
        stacked.append(torch.stack([functional.pad(row, (0, 0, columns - row.shape[1], 0)) for row in rows]))
    return list(zip(stacked[::2], stacked[1::2], strict=True))
