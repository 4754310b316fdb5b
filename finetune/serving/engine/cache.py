"""What is kept between requests: features of media, keys and values of prompts. Bounded by bytes, oldest first out."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 16  # tokens whose keys and values are kept, found and given up together
KeysValues = list[tuple[Tensor, Tensor]]  # of each layer: (B, heads, T, width)


class Kept:
    """{key: value}, up to `limit` bytes; what was used last stays. Safe between threads."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._lock = threading.Lock()
        self._content: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._content

    def get(self, key: Hashable) -> Any:
        """The value, which is now the newest; None where there is none."""
        with self._lock:
            if key not in self._content:
                return None
            self._content.move_to_end(key)
            return self._content[key][0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        with self._lock:
            if size > self.limit or key in self._content:
                return
            self._content[key] = (value, size)
            self.bytes += size
            while self.bytes > self.limit:
                _, (_, freed) = self._content.popitem(last=False)
                self.bytes -= freed

    def clear(self) -> None:
        with self._lock:
            self._content.clear()
            self.bytes = 0


class PrefixCache:
    """Keys and values of prompts' beginnings, in blocks of tokens, each found by all that stands up to its end: text by
    its token ids, media by their content. Prompts that begin alike share their blocks.
    """

    def __init__(self, limit: int) -> None:
        self.kept = Kept(limit)

    def names(self, model: str, symbols: Sequence[str]) -> list[bytes]:
        """What a prompt's whole blocks are called. `symbols`: a text for each token; of media, what they hold."""
        found, name = [], hashlib.sha256(model.encode()).digest()
        for start in range(0, len(symbols) - BLOCK + 1, BLOCK):
            name = hashlib.sha256(name + " ".join(symbols[start : start + BLOCK]).encode()).digest()
            found.append(name)
        return found

    def length(self, names: Sequence[bytes]) -> int:
        """Tokens from the beginning that are here."""
        count = next((n for n, name in enumerate(names) if name not in self.kept), len(names))
        return count * BLOCK

    def read(self, names: Sequence[bytes], tokens: int) -> list[Tensor]:
        """Keys and values of the first `tokens`, of each layer in turn, each (heads, tokens, width); [] where some of
        them have gone.
        """
        # The first are asked for last, and so stay longest.
        blocks = [self.kept.get(name) for name in reversed(names[: -(-tokens // BLOCK)])][::-1]
        if not tokens or any(block is None for block in blocks):
            return []
        return [torch.cat(parts, 1)[:, :tokens] for parts in zip(*blocks, strict=True)]

    def write(self, names: Sequence[bytes], keys_values: KeysValues, row: int, start: int) -> None:
        """Keep what isn't here yet of row `row`, whose first token stands in column `start`."""
        for number, name in enumerate(names):
            if self.kept.limit and name not in self.kept:
                columns = slice(start + number * BLOCK, start + (number + 1) * BLOCK)
                block = [tensor[row, :, columns].clone() for pair in keys_values for tensor in pair]
                self.kept.put(name, block, sum(tensor.nbytes for tensor in block))
