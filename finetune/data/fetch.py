"""Media that rows name by address: downloaded once, from hosts that the recipe names, within bounds."""

import hashlib
import time
from collections.abc import Sequence
from functools import partial
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from finetune.common.errors import DataError, MediaError
from finetune.data.media_store import store_folder, stored, write_whole

if TYPE_CHECKING:
    from httpx2 import URL

SECONDS_IN_ALL = 600.0
REDIRECTS = 5
NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address


def fetched(address: str, hosts: Sequence[str], where: str, max_bytes: int) -> Path:
    """The file of the medium at an http(s) address, downloaded unless it is in the cache.

    The address and each that it redirects to must be of `hosts`: a name, or `*.example.com` for those below it, which
    must have public addresses. Raises DataError for another host, and for a download that fails.
    """
    _parsed(address, hosts, where)
    note = store_folder() / "addresses" / hashlib.sha256(address.encode()).hexdigest()
    if note.is_file():
        path = store_folder() / note.read_text(encoding="ascii")
        if path.is_file():
            return path
    path = stored(content_at(address, hosts, where, max_bytes), f"{where}: {address[:200]}", max_bytes)
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
    """The content of an http(s) address, which isn't cached. `hosts`: as for `fetched`. `private`: hosts that `hosts`
    writes out may have private addresses, and errors tell these. `seconds`: for the whole download, redirects included.

    An address that isn't allowed is refused before it is connected to. Raises DataError.
    """
    import httpcore2

    from finetune.data._connection import Connections

    seconds = SECONDS_IN_ALL if seconds is None else seconds
    deadline = time.monotonic() + seconds
    for _ in range(REDIRECTS + 1):
        url, written_out = _parsed(address, hosts, where)
        check = None if written_out and private else partial(_check_public, address, where, private)
        target = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        headers = [(b"Host", url.netloc), (b"User-Agent", b"finetune"), (b"Accept-Encoding", b"identity")]
        try:
            with (
                httpcore2.ConnectionPool(network_backend=Connections(deadline, check)) as pool,
                pool.stream("GET", target, headers=headers) as response,
            ):
                location = next((value for name, value in response.headers if name.lower() == b"location"), b"")
                if response.status in (301, 302, 303, 307, 308) and location:
                    address = urljoin(address, location.decode("latin-1"))
                    continue
                if response.status != 200:
                    reason = response.extensions.get("reason_phrase", b"").decode("latin-1")
                    raise DataError(f"{where}: {address[:200]}: the host answered {response.status} {reason}")
                content = bytearray()
                for chunk in response.iter_stream():
                    content += chunk
                    if len(content) > max_bytes:
                        raise MediaError(f"{where}: {address[:200]}: more than {max_bytes:,} bytes (`media.max_bytes`)")
                return bytes(content)
        except (
            OSError,
            ValueError,
            httpcore2.TimeoutException,
            httpcore2.NetworkError,
            httpcore2.ProtocolError,
        ) as error:
            if time.monotonic() >= deadline:
                raise DataError(f"{where}: {address[:200]}: not complete after {seconds:g} s") from None
            raise DataError(f"{where}: {address[:200]}: can't be fetched ({error or type(error).__name__})") from None
    raise DataError(f"{where}: {address[:200]}: more than {REDIRECTS} redirects")


def _parsed(address: str, hosts: Sequence[str], where: str) -> tuple["URL", bool]:
    """An address, and whether `hosts` writes its host out. Raises DataError unless `hosts` allows it."""
    from httpx2 import URL, InvalidURL

    try:
        url = URL(address)
        names = {url.host, url.raw_host.decode("ascii")}  # in Unicode and in Punycode
    except (InvalidURL, ValueError) as error:
        raise DataError(f"{where}: {address[:200]!r} is no address ({error})") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise DataError(f"{where}: {address[:200]!r} is an address, but not of http or https; write a path")
    allowed = [name.lower() for name in hosts]
    if not names.isdisjoint(allowed):
        return url, True
    if any(pattern.startswith("*.") and name.endswith(pattern[1:]) for pattern in allowed for name in names):
        return url, False
    raise DataError(
        f"{where}: {address[:200]!r} is an address of a host that `hosts` doesn't name; add {url.host!r}, or write a "
        "path"
    )


def _check_public(address: str, where: str, private: bool, peer: IPv4Address | IPv6Address) -> None:
    if not _is_public(peer):
        target = f"to {peer}, in a private network; name the host in `hosts`" if private else "into a private network"
        raise DataError(f"{where}: {address[:200]!r} leads {target}")


def _is_public(peer: IPv4Address | IPv6Address) -> bool:
    """Whether it is of one machine on the internet; an IPv6 address that stands for an IPv4 one is judged by that."""
    if isinstance(peer, IPv6Address):
        translated = IPv4Address(int(peer) & 0xFFFF_FFFF) if peer in NAT64 else None
        if inner := peer.ipv4_mapped or peer.sixtofour or translated:
            return _is_public(inner)
        if peer.is_site_local:
            return False
    return peer.is_global and not (peer.is_multicast or peer.is_reserved)
