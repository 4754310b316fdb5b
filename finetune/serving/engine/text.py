"""Tokens to text that won't change any more: whole characters, nothing of a stop string."""

from collections.abc import Sequence
from typing import Any

HALF = "\ufffd"  # what decoders put where bytes make no character, or none yet


class Text:
    """Grows token by token. `released` is what may be shown; once `stopped`, it is all there is."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(one for one in stop if one)
        self._ids: list[int] = []
        # Tokens are decoded with those before them, from a point between characters: many decoders put or drop a space
        # at the beginning. `_begin` to `_read` has been seen, and read as `_seen`.
        self._begin = self._read = 0
        self._seen = ""
        self._text = ""  # of all tokens up to `_read`
        self._end = 0  # of what has been released

    @property
    def whole(self) -> bool:
        """Whether all tokens' text has been released."""
        return self._read == len(self._ids) and self._end == len(self._text)

    @property
    def length(self) -> int:
        """Characters that are certain so far."""
        return len(self._text)

    @property
    def end(self) -> int:
        """Characters released so far."""
        return self._end

    def add(self, token: int) -> None:
        self._ids.append(token)
        self._grow()

    def release(self, last: bool = False) -> str:
        """What has become certain since the last call; with `last`, all that is left, half characters too."""
        if last and not self.stopped:
            self._grow(last=True)
        end = len(self._text) if last or self.stopped else len(self._text) - self._held()
        found = self._text[self._end : end]
        self._end = max(end, self._end)
        return found

    def _grow(self, last: bool = False) -> None:
        text = self._decode(self._ids[self._begin :])
        if len(text) <= len(self._seen) or (text.endswith(HALF) and not last):
            return
        before = len(self._text)
        self._text += text[len(self._seen) :]
        self._begin, self._read = self._read, len(self._ids)
        self._seen = self._decode(self._ids[self._begin :])
        for stop in self._stop:
            if (found := self._text.find(stop, max(self._end, before - len(stop) + 1))) >= 0:
                self._text, self.stopped = self._text[:found], True

    def _held(self) -> int:
        """How many characters at the end may begin a stop string."""
        tails = (n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n]))
        return max(tails, default=0)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
