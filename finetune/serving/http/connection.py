"""Connections that nobody asks anything on are closed: uvicorn itself would wait for a request's head for ever."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def patient_for(seconds: float) -> type[H11Protocol]:
    """What uvicorn's `http` takes: a connection on which no request has begun in the time, s, is closed."""

    class Patient(H11Protocol):
        waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.look()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.look()

        def connection_lost(self, exc: Exception | None) -> None:
            self.unset()
            super().connection_lost(exc)

        def look(self) -> None:
            cycle: Any = self.cycle  # the last request; none at first
            if cycle is not None and not cycle.response_complete:
                self.unset()
            elif self.waiting is None:  # what has come since may be the beginning of a head: the time goes on
                self.waiting = self.loop.call_later(seconds, self.transport.close)

        def unset(self) -> None:
            if self.waiting is not None:
                self.waiting.cancel()
                self.waiting = None

    return Patient
