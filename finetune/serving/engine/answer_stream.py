"""One answer, piece by piece, from the worker's thread to an event loop."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from finetune.serving.engine.contract import AnswerPiece, TimedOut


class AnswerStream:
    """The worker calls `put`; the event loop in which it was made iterates, and may `cancel`. `deadline`: as
    `time.monotonic()`. Iteration raises DataError for media or text that can't be used, TimedOut, MemoryError, or Busy
    before the first piece. The token counts are valid once the first piece has arrived.
    """

    def __init__(self, timeout_seconds: float, wake_worker: Callable[[], None]) -> None:
        self.prompt_tokens = self.completion_tokens = self.cached_tokens = 0
        self.deadline = time.monotonic() + timeout_seconds
        self.cancelled = False
        self._timeout_seconds = timeout_seconds
        self._wake_worker = wake_worker
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[AnswerPiece | BaseException] = asyncio.Queue()

    @property
    def timed_out(self) -> TimedOut:
        if self.deadline == 0:  # set by a worker that stops
            return TimedOut("the server stopped before this answer was complete; ask again")
        return TimedOut(
            f"the answer wasn't complete after {self._timeout_seconds:g} s; ask for fewer tokens, or raise "
            "`timeout_seconds`"
        )

    def put(self, item: AnswerPiece | BaseException) -> None:
        """The next piece, or the error that ends the answer."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:  # that event loop is closed
            self.cancelled = True

    def cancel(self) -> None:
        """Stop the answer: the worker drops it before its next step."""
        self.cancelled = True
        self._wake_worker()

    async def __aiter__(self) -> AsyncIterator[AnswerPiece]:
        finish_reason = None
        while finish_reason is None:
            try:
                async with asyncio.timeout(self.deadline - time.monotonic()):
                    item = await self._items.get()
            except TimeoutError:  # not left to the worker, which may be in a long step
                self.cancel()
                raise self.timed_out from None
            if not isinstance(item, AnswerPiece):
                raise item
            finish_reason = item.finish_reason
            yield item
