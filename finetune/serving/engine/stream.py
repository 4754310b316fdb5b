"""From the worker's thread to an event loop: one answer, piece by piece."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable

from finetune.serving.engine.contract import Piece, TimedOut


class Stream:
    """One answer. The worker calls `put` and `fail`; an event loop iterates, and may `cancel`."""

    def __init__(self, timeout_seconds: float, wake_worker: Callable[[], None]) -> None:
        self.prompt_tokens = self.completion_tokens = self.cached_tokens = 0
        self.deadline = time.monotonic() + timeout_seconds
        self.cancelled = False
        self._timeout_seconds = timeout_seconds
        self._wake_worker = wake_worker
        self._lock = threading.Lock()
        self._ready: deque[Piece | BaseException] = deque()
        self._ended = False
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    @property
    def timed_out(self) -> TimedOut:
        if self.deadline == 0:  # set by a worker that stops
            return TimedOut("the server ended before this answer was whole; ask again")
        return TimedOut(f"no whole answer within {self._timeout_seconds:g} s; ask for fewer tokens, or allow more time")

    def put(self, piece: Piece) -> None:
        self._add(piece)

    def fail(self, error: BaseException) -> None:
        self._add(error)

    def cancel(self) -> None:
        """Nobody reads on: the worker lets go of the answer before its next step."""
        self.cancelled = True
        self._wake_worker()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Piece:
        with self._lock:
            if self._reader is None:
                self._reader = (asyncio.get_running_loop(), asyncio.Event())
            event = self._reader[1]
        while True:
            with self._lock:
                if self._ready:
                    return self._next()
                if self._ended:
                    raise StopAsyncIteration
                event.clear()
            try:
                await asyncio.wait_for(event.wait(), self.deadline - time.monotonic())
            except TimeoutError:  # the worker may be busy with a long step: whoever waits needn't
                self._ended = True
                self.cancel()
                raise self.timed_out from None

    def _next(self) -> Piece:
        found = self._ready.popleft()
        if isinstance(found, Piece):
            self._ended = found.finish_reason is not None
            return found
        self._ended = True
        raise found

    def _add(self, found: Piece | BaseException) -> None:
        with self._lock:
            self._ready.append(found)
            reader = self._reader
            if reader is None or reader[1].is_set():
                return
        try:
            reader[0].call_soon_threadsafe(reader[1].set)
        except RuntimeError:  # that event loop is closed
            self.cancelled = True
