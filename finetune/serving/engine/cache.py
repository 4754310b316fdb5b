"""Caches between requests, bounded in bytes: features of media, keys and values of prompts."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

BLOCK = 16  # tokens whose keys and values are stored and evicted together
KeysValues = list[tuple[Tensor, Tensor]]  # of each layer: (B, heads, T, width)
V = TypeVar("V")


class LRUCache(Generic[V]):
    """Up to `limit` bytes of values; the least recently used are evicted first. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def get(self, key: Hashable) -> V | None:
        """The value, now the most recently used; None if there is none."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, value: V, size: int) -> None:
        with self._lock:
            if size > self.limit or key in self._entries:
                return
            self._entries[key] = (value, size)
            self.bytes += size
            while self.bytes > self.limit:
                _, (_, freed) = self._entries.popitem(last=False)
                self.bytes -= freed

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.bytes = 0


class PrefixCache:
    """Keys and values of the beginnings of prompts, in blocks of tokens. A block's key is a hash of all tokens up to
    its end (text by token id, media by content), so prompts with the same beginning share blocks.
    """

    def __init__(self, limit: int) -> None:
        self.blocks: LRUCache[list[Tensor]] = LRUCache(limit)

    def keys(self, model: str, symbols: Sequence[str]) -> list[bytes]:
        """The keys of a prompt's whole blocks. `symbols`: one text per token; for placeholders, the medium's name."""
        keys, key = [], hashlib.sha256(model.encode()).digest()
        for start in range(0, len(symbols) - BLOCK + 1, BLOCK):
            key = hashlib.sha256(key + " ".join(symbols[start : start + BLOCK]).encode()).digest()
            keys.append(key)
        return keys

    def length(self, keys: Sequence[bytes]) -> int:
        """How many tokens from the beginning are cached."""
        count = next((n for n, key in enumerate(keys) if key not in self.blocks), len(keys))
        return count * BLOCK

    def read(self, keys: Sequence[bytes], tokens: int) -> list[Tensor]:
        """Keys and values of the first `tokens`, layer by layer, each (heads, tokens, width); [] if some have been
        evicted.
        """
        # The first block is read last: it is the one to be evicted last.
        blocks = [self.blocks.get(key) for key in reversed(keys[: -(-tokens // BLOCK)])][::-1]
        complete = [block for block in blocks if block is not None]
        if not tokens or len(complete) < len(blocks):
            return []
        return [torch.cat(parts, 1)[:, :tokens] for parts in zip(*complete, strict=True)]

    def write(self, keys: Sequence[bytes], keys_values: KeysValues, row: int, start: int) -> None:
        """Store the blocks of row `row` that aren't cached yet; its first token stands in column `start`."""
        for number, key in enumerate(keys):
            if self.blocks.limit and key not in self.blocks:
                columns = slice(start + number * BLOCK, start + (number + 1) * BLOCK)
                block = [tensor[row, :, columns].clone() for pair in keys_values for tensor in pair]
                self.blocks.put(key, block, sum(tensor.nbytes for tensor in block))
