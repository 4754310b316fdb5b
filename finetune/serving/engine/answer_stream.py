"""One answer, piece by piece, from the worker's thread to an event loop."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable

from finetune.serving.engine.contract import Piece, TimedOut


class AnswerStream:
    """The worker calls `put`; an event loop iterates, and may `cancel`. `deadline`: as `time.monotonic()`."""

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
            return TimedOut("the server stopped before this answer was complete; ask again")
        return TimedOut(
            f"the answer wasn't complete after {self._timeout_seconds:g} s; ask for fewer tokens, or raise "
            "`timeout_seconds`"
        )

    def put(self, item: Piece | BaseException) -> None:
        """The next piece, or the error that ends the answer."""
        with self._lock:
            self._ready.append(item)
            reader = self._reader
            if reader is None or reader[1].is_set():
                return
        try:
            reader[0].call_soon_threadsafe(reader[1].set)
        except RuntimeError:  # that event loop is closed
            self.cancelled = True

    def cancel(self) -> None:
        """Stop the answer: the worker drops it before its next step."""
        self.cancelled = True
        self._wake_worker()

    def __aiter__(self) -> "AnswerStream":
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
            except TimeoutError:  # not left to the worker, which may be in a long step
                self._ended = True
                self.cancel()
                raise self.timed_out from None

    def _next(self) -> Piece:
        item = self._ready.popleft()
        if isinstance(item, Piece):
            self._ended = item.finish_reason is not None
            return item
        self._ended = True
        raise item
