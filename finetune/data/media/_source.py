"""Shared by the decoders: opening a file safely, checking its limits, and describing what is wrong with it."""

import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from finetune.common.errors import MediaError
from finetune.recipe.schema import Limits

LIMITS = Limits()  # of a recipe that names none


def named(source: Path | bytes, where: str, kind: str) -> str:
    """The beginning of an error: `where` (file and row), else the path, else the kind of medium."""
    return where or (str(source) if isinstance(source, Path) else kind)


@contextmanager
def opened(source: Path | bytes, name: str, limits: Limits) -> Iterator[BinaryIO]:
    """Open a regular file, or bytes, of 1 to `max_bytes`, for reading: no pipe or device. The file object's name isn't
    its path, so that no decoder reads other files beside it. Raises MediaError.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else _open(source, name) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size == 0:
            raise MediaError(f"{name}: empty, 0 bytes; write the file anew")
        if size > limits.max_bytes:
            raise MediaError(f"{name}: {size:,} bytes; at most {limits.max_bytes:,} are read (`media.max_bytes`)")
        yield file


def _open(path: Path, name: str) -> BinaryIO:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise MediaError(f"{name}: a folder, not a file: {path}")
        if not stat.S_ISREG(mode):
            raise MediaError(f"{name}: a pipe or device, not a file: {path}")
        # Doesn't block if a pipe has replaced the file meanwhile.
        return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    except FileNotFoundError:
        raise MediaError(f"{name}: no such file: {path}") from None
    except PermissionError:
        raise MediaError(f"{name}: no permission to read it: {path}") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{name}: can't be opened ({reason(error)})") from None


def reason(error: BaseException) -> str:
    """A library's error in one line, without addresses in memory."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return re.sub(r" ?<[^<>]* object at 0x[^<>]*>", "", " ".join(str(text).split()))[:200]


def described(value: object) -> str:
    """What was given in place of a medium: "an array (4, 4) of float64", "a list"."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return f"a {type(value).__name__}" if shape is None else f"an array {tuple(shape)} of {dtype}"


def check_seconds(seconds: float, limits: Limits, name: str) -> None:
    """Raises MediaError for a recording or video that is too long."""
    if seconds > limits.max_seconds:
        most = f"{limits.max_seconds:,g} s are read (`media.max_seconds`)"
        raise MediaError(f"{name}: {seconds:,.1f} s or more; at most {most}")


def check_pixels(width: int, height: int, limits: Limits, name: str) -> None:
    """Raises MediaError for a picture or frame that is too large."""
    if width * height > limits.max_pixels:
        most = f"{limits.max_pixels:,} are decoded (`media.max_pixels`)"
        raise MediaError(f"{name}: {width}x{height} pixels; at most {most}")
