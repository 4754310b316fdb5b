"""Media that rows name by address: fetched once, from hosts that the recipe names, within bounds."""

import hashlib
import http.client
import ipaddress
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from finetune.common.errors import DataError, MediaError
from finetune.data.media_store import kept, store_folder, write_whole

SECONDS = 30.0  # without a sign of life
SECONDS_IN_ALL = 600.0
REDIRECTS = 5
CHUNK = 2**16
HEADERS = {"User-Agent": "finetune", "Accept-Encoding": "identity"}
SAFE = "/%:@!$&'()*+,;=~?[]"  # not to be escaped once more
CONNECTIONS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}


def fetched(address: str, hosts: Sequence[str], where: str, max_bytes: int) -> Path:
    """The file of what stands at an http(s) address; without network where it was fetched before.

    The address and each that it redirects to must be of `hosts`: a name, or `*.example.com` for those below it, whose
    machines must have public addresses. Raises DataError for another host, and for whatever goes wrong on the way.
    """
    _check(address, hosts, where)
    note = store_folder() / "addresses" / hashlib.sha256(address.encode()).hexdigest()
    if note.is_file():
        path = store_folder() / note.read_text(encoding="ascii")
        if path.is_file():
            return path
    path = kept(content_at(address, hosts, where, max_bytes), f"{where}: {address[:200]}", max_bytes)
    write_whole(note, path.relative_to(store_folder()).as_posix().encode())
    return path


def content_at(
    address: str,
    hosts: Sequence[str],
    where: str,
    max_bytes: int,
    *,
    private: bool = True,
    seconds: float | None = None,
) -> bytes:
    """What stands at an http(s) address, kept nowhere. As `fetched`; without `private` a host that `hosts` names
    itself must have a public address too, and isn't told its machine's. `seconds`: in all. Raises DataError.
    """
    seconds = SECONDS_IN_ALL if seconds is None else seconds
    end = time.monotonic() + seconds
    here = address
    for _ in range(REDIRECTS + 1):
        parts, written = _check(here, hosts, where)
        try:
            left = max(0.001, end - time.monotonic())
            connection = CONNECTIONS[parts.scheme](parts.hostname or "", parts.port, timeout=min(SECONDS, left))
            with _connected(connection, end) as opened:
                if not (written and private):
                    _check_public(opened, here, where, private)
                connection.request("GET", _target(parts), headers=HEADERS)
                response = connection.getresponse()
                moved = response.getheader("Location")
                if response.status in (301, 302, 303, 307, 308) and moved:
                    here = urljoin(here, moved)
                    continue
                if response.status != 200:
                    raise DataError(f"{where}: {here[:200]}: the host says {response.status} {response.reason}")
                return _body(response, f"{where}: {here[:200]}", max_bytes, end, seconds)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= end:
                raise DataError(f"{where}: {here[:200]}: not there after {seconds:g} s") from None
            raise DataError(f"{where}: {here[:200]}: can't be fetched ({error or type(error).__name__})") from None
    raise DataError(f"{where}: {address[:200]}: more than {REDIRECTS} redirects")


@contextmanager
def _connected(connection: http.client.HTTPConnection, end: float) -> Iterator[socket.socket]:
    """The open connection's socket, shut at `end` (as of time.monotonic) whatever it is about: a timeout of its own
    begins anew with each byte.
    """
    try:
        connection.connect()
        opened = connection.sock

        def shut() -> None:
            with suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(max(0.0, end - time.monotonic()), shut)
        timer.daemon = True
        timer.start()
        try:
            yield opened
        finally:
            timer.cancel()
    finally:
        connection.close()


def _check(address: str, hosts: Sequence[str], where: str) -> tuple[SplitResult, bool]:
    """An address in parts, and whether `hosts` writes its host itself. Raises DataError where it doesn't allow it."""
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise DataError(f"{where}: {address[:200]!r} is no address ({error})") from None
    if parts.scheme not in CONNECTIONS or not host:
        raise DataError(f"{where}: {address[:200]!r} is an address, but not of http or https; write a path")
    names = [name.lower() for name in hosts]
    if host in names:
        return parts, True
    if any(name.startswith("*.") and host.endswith(name[1:]) for name in names):
        return parts, False
    raise DataError(
        f"{where}: {address[:200]!r} is an address of a host that `hosts` doesn't name; add {host!r}, or write a path"
    )


def _check_public(connected: socket.socket, address: str, where: str, private: bool) -> None:
    """Asked of the connection itself, so that a name can't change its mind between the question and the call."""
    peer = ipaddress.ip_address(str(connected.getpeername()[0]).partition("%")[0])
    if not (getattr(peer, "ipv4_mapped", None) or peer).is_global:
        told = f"to {peer}, in a private network; name the host in `hosts`" if private else "into a private network"
        raise DataError(f"{where}: {address[:200]!r} leads {told}")


def _target(parts: SplitResult) -> str:
    query = f"?{quote(parts.query, safe=SAFE)}" if parts.query else ""
    return quote(parts.path or "/", safe=SAFE) + query


def _body(response: http.client.HTTPResponse, name: str, max_bytes: int, end: float, seconds: float) -> bytes:
    content = bytearray()
    while chunk := response.read1(CHUNK):  # what has come, so that one who trickles is timed
        content += chunk
        if len(content) > max_bytes:
            raise MediaError(f"{name}: more than {max_bytes:,} bytes (`media.max_bytes`)")
        if time.monotonic() >= end:
            break
    if time.monotonic() >= end:  # what was shut looks as if it had ended
        raise DataError(f"{name}: not there after {seconds:g} s")
    if response.length:
        raise DataError(f"{name}: broke off, {response.length:,} bytes before its end")
    return bytes(content)
