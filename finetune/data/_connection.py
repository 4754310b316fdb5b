"""Connections of `fetch`: only to addresses that were checked, and with one deadline for all that they do.

Apart from it, as httpcore2 is only there for downloads: vLLM's environment goes without.
"""

import ipaddress
import socket
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from httpcore2 import ConnectError, ConnectTimeout, NetworkBackend, NetworkStream, ReadTimeout, SyncBackend

SECONDS = 30.0  # without a byte


class Connections(NetworkBackend):
    """Resolves a host once, has each of its addresses checked, then connects to these addresses and not to the name:
    what the name leads to later doesn't matter. `check` raises for an address that is refused; None: all are allowed.
    `deadline`: of time.monotonic(), for the connection and all that is read and written.
    """

    def __init__(self, deadline: float, check: Callable[[IPv4Address | IPv6Address], None] | None) -> None:
        self.deadline = deadline
        self.check = check

    def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> NetworkStream:
        resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(address) for *_, (address, *_) in resolved))
        if self.check:
            for address in addresses:
                self.check(ipaddress.ip_address(address.partition("%")[0]))
        failure: Exception = ConnectError(f"{host} has no address")
        for address in addresses:
            try:
                return _Stream(SyncBackend().connect_tcp(address, port, seconds_left(self.deadline)), self.deadline)
            except (ConnectError, ConnectTimeout) as error:
                failure = error
        raise failure


class _Stream(NetworkStream):
    """A connection whose every step ends by the deadline: a timeout of its own would begin anew with each byte."""

    def __init__(self, stream: NetworkStream, deadline: float) -> None:
        self.stream = stream
        self.deadline = deadline

    def read(self, max_bytes: int, *_: Any, **__: Any) -> bytes:
        return self.stream.read(max_bytes, seconds_left(self.deadline))

    def write(self, buffer: bytes, *_: Any, **__: Any) -> None:
        self.stream.write(buffer, seconds_left(self.deadline))

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, *_: Any, **__: Any) -> NetworkStream:
        secured = self.stream.start_tls(ssl_context, server_hostname, seconds_left(self.deadline))
        return _Stream(secured, self.deadline)

    def close(self) -> None:
        self.stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self.stream.get_extra_info(info)


def seconds_left(deadline: float) -> float:
    """How long the next step may take. Raises ReadTimeout after the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise ReadTimeout("timed out")
    return min(SECONDS, left)
