"""Idle connections are closed: uvicorn itself waits without a time limit for a request's headers, and for a client that
reads nothing of its answer.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol_with_timeout(seconds: float) -> type[H11Protocol]:
    """For uvicorn's `http`: connections are closed on which no request begins within the time, or whose client reads
    nothing for as long while an answer waits to be sent.
    """

    class TimeoutProtocol(H11Protocol):
        timer: asyncio.TimerHandle | None = None
        unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.update_timer()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.update_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self.stop_timer()
            self.stop_unread()
            super().connection_lost(exc)

        def pause_writing(self) -> None:  # the transport's buffer is full
            super().pause_writing()
            self.unread = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self.stop_unread()
            super().resume_writing()

        def stop_unread(self) -> None:
            if self.unread is not None:
                self.unread.cancel()
                self.unread = None

        def update_timer(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self.stop_timer()
            elif self.timer is None:  # partial headers don't restart it
                self.timer = self.loop.call_later(seconds, self.transport.close)

        def stop_timer(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

    return TimeoutProtocol
