"""Tokens to final text: whole characters, no part of a stop string."""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # decoders write it for bytes that make no character, or not yet


class IncrementalDecoder:
    """The text of an answer as its tokens arrive. `release` gives what is final; once `stopped`, no more will come."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        # Tokens are decoded together with those before them, from a boundary between characters on: many decoders add
        # or drop a space at the beginning. Tokens `_begin` to `_decoded` gave `_context`, which is in `_text` already.
        self._begin = self._decoded = 0
        self._context = ""
        self._text = ""  # of all tokens up to `_decoded`
        self.released = 0  # characters

    @property
    def whole(self) -> bool:
        """Whether the text of all tokens has been released."""
        return self._decoded == len(self._ids) and self.released == len(self._text)

    @property
    def length(self) -> int:
        """Characters decoded so far."""
        return len(self._text)

    def add(self, token: int) -> None:
        self._ids.append(token)
        self._grow()

    def release(self, last: bool = False) -> str:
        """The text that has become final since the last call; with `last`, all of it, broken characters included."""
        if last and not self.stopped:
            self._grow(last=True)
        end = len(self._text) if last or self.stopped else len(self._text) - self._stop_prefix()
        text = self._text[self.released : end]
        self.released = max(end, self.released)
        return text

    def _grow(self, last: bool = False) -> None:
        text = self._decode(self._ids[self._begin :])
        if len(text) <= len(self._context) or (text.endswith(REPLACEMENT) and not last):
            return
        before = len(self._text)
        self._text += text[len(self._context) :]
        self._begin, self._decoded = self._decoded, len(self._ids)
        self._context = self._decode(self._ids[self._begin :])
        for stop in self._stop:
            if (start := self._text.find(stop, max(self.released, before - len(stop) + 1))) >= 0:
                self._text, self.stopped = self._text[:start], True

    def _stop_prefix(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        prefixes = (n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n]))
        return max(prefixes, default=0)

    def _decode(self, ids: list[int]) -> str:
        result: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return result
