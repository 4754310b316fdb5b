"""Hashes of the contents of media files, kept between runs: a file is read again where its size, time or inode isn't
what it was.
"""

import os
import sqlite3
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import RLock
from time import time_ns
from typing import NamedTuple

from finetune.common.run_folder import file_hash
from finetune.common.user_cache import user_cache

SETTLED = 2 * 10**9  # nanoseconds after which another change of a file has another time, on any file system
PENDING_FILES, PENDING_BYTES = 256, 64 * 2**20  # hashed files that are written to the index at once
REMEMBERED = 2**12  # in memory
SCHEMA = """
create table if not exists media (path text primary key, size integer, modified integer, inode integer, sha256 text)
without rowid
"""


class Stamp(NamedTuple):
    """What changes when a file does: bytes, nanoseconds since 1970, number of its inode."""

    size: int
    modified: int
    inode: int

    @classmethod
    def of(cls, path: Path | str) -> "Stamp":
        """Raises OSError."""
        status = os.stat(path)
        # Network file systems number inodes up to 2^64, which neither SQLite nor an int64 holds.
        return cls(status.st_size, status.st_mtime_ns, status.st_ino & (2**63 - 1))

    @property
    def settled(self) -> bool:
        """Whether a file with this stamp, read now, is known by it from now on."""
        return self.modified < time_ns() - SETTLED


class MediaIndex:
    """{path: stamp and SHA-256} in SQLite. Where its file can't be read or written, files are hashed each time."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = RLock()
        self._base: sqlite3.Connection | None = None
        self._process = 0
        self._remembered: dict[str, tuple[Stamp, str]] = {}
        self._pending: dict[str, tuple[Stamp, str]] = {}
        self._pending_bytes = 0

    def sha256(self, path: Path) -> str:
        """Of a file's content, hexadecimal. Raises OSError."""
        name, stamp = str(path), Stamp.of(path)
        with self._lock:
            known = self._remembered.get(name) or self._pending.get(name) or self._found(name)
        digest = known[1] if known is not None and known[0] == stamp else file_hash(path)
        with self._lock:
            if len(self._remembered) >= REMEMBERED:
                self._remembered.clear()
            self._remembered[name] = (stamp, digest)
            if (known is None or known[0] != stamp) and stamp.settled:
                self._pending[name] = (stamp, digest)
                self._pending_bytes += stamp.size
                if len(self._pending) >= PENDING_FILES or self._pending_bytes >= PENDING_BYTES:
                    self.write()
        return digest

    def write(self) -> None:
        """Write what is only in memory yet."""
        with self._lock:
            rows = [(name, *stamp, digest) for name, (stamp, digest) in self._pending.items()]
            self._pending.clear()
            self._pending_bytes = 0
            with suppress(sqlite3.Error, OSError, UnicodeEncodeError):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                base = self._connected()
                with base:
                    base.execute(SCHEMA)
                    base.executemany("insert or replace into media values (?, ?, ?, ?, ?)", rows)

    def _found(self, name: str) -> tuple[Stamp, str] | None:
        with suppress(sqlite3.Error, UnicodeEncodeError):
            if self._base is not None or self.file.is_file():
                query = "select size, modified, inode, sha256 from media where path = ?"
                for size, modified, inode, digest in self._connected().execute(query, (name,)):
                    return Stamp(size, modified, inode), digest
        return None

    def _connected(self) -> sqlite3.Connection:
        if self._base is None or self._process != os.getpid():  # a forked process needs a connection of its own
            self._base = sqlite3.connect(self.file, timeout=1.0, check_same_thread=False)
            self._base.execute("pragma synchronous = off")
            self._process = os.getpid()
        return self._base


@cache
def _index_at(file: Path) -> MediaIndex:
    return MediaIndex(file)


def media_index() -> MediaIndex:
    """The user's."""
    return _index_at(user_cache("media-index") / "sha256.sqlite")
