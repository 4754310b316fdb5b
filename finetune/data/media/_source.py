"""What the decoders share: a file opened safely, and the words for what is wrong with it."""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from finetune.common.errors import MediaError

MAX_BYTES = 256 * 2**20
MAX_PIXELS = 64 * 10**6
MAX_SECONDS = 1800.0
MAX_FRAMES = 256


def named(source: Path | bytes, where: str, kind: str) -> str:
    """What an error begins with: `where` (file and row) if there is one, else the path, else the kind of medium."""
    return where or (str(source) if isinstance(source, Path) else kind)


@contextmanager
def opened(source: Path | bytes, name: str, max_bytes: int) -> Iterator[BinaryIO]:
    """A regular file, or bytes, for reading; 1 to `max_bytes` of them. Pipes and devices are refused unopened.

    The file object's own name isn't its path, so that no decoder takes it for a place where other files may lie.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else _open(source, name) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size == 0:
            raise MediaError(f"{name}: empty, 0 bytes; write the file anew")
        if size > max_bytes:
            raise MediaError(f"{name}: {size:,} bytes; at most {max_bytes:,} are read (`media.max_bytes`)")
        yield file


def _open(path: Path, name: str) -> BinaryIO:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise MediaError(f"{name}: a folder, not a file: {path}")
        if not stat.S_ISREG(mode):
            raise MediaError(f"{name}: a pipe or device, not a file: {path}")
        # Not to block, should a pipe have taken the file's place since.
        return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    except FileNotFoundError:
        raise MediaError(f"{name}: no such file: {path}") from None
    except PermissionError:
        raise MediaError(f"{name}: may not be read, by its permissions: {path}") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{name}: can't be opened ({reason(error)})") from None


def reason(error: BaseException) -> str:
    """What a library said, in one line."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(said).split())[:200]
