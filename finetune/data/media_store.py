"""Media embedded in rows, as bytes or data URIs, become files of the cache: each content once, named by its sha256."""

import base64
import binascii
import hashlib
import os
import re
import tempfile
from pathlib import Path
from urllib.parse import unquote_to_bytes

from finetune.common.errors import DataError, MediaError
from finetune.common.user_cache import user_cache

# The first bytes of a file, where `.` is any byte -> its suffix.
MAGIC = (
    (rb"\x89PNG", ".png"),
    (rb"\xff\xd8\xff", ".jpg"),
    (rb"GIF8", ".gif"),
    (rb"BM", ".bmp"),
    (rb"II\*\0|MM\0\*", ".tiff"),
    (rb"RIFF....WEBP", ".webp"),
    (rb"RIFF....WAVE", ".wav"),
    (rb"RIFF....AVI ", ".avi"),
    (rb"fLaC", ".flac"),
    (rb"OggS", ".ogg"),
    (rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]", ".mp3"),
    (rb"....ftypM4A", ".m4a"),
    (rb"....ftyp", ".mp4"),
    (rb"\x1aE\xdf\xa3", ".mkv"),
    (rb".{128}DICM", ".dcm"),
)


def store_folder() -> Path:
    """The folder of embedded and downloaded media."""
    return user_cache("media")


def suffix_of(content: bytes) -> str:
    """'.png' for the bytes of a PNG; '.bin' for an unknown format."""
    return next((suffix for magic, suffix in MAGIC if re.match(magic, content, re.DOTALL)), ".bin")


def stored(content: bytes, where: str, max_bytes: int) -> Path:
    """The file of the cache that holds these bytes, written unless it is there. `where` (file and row) begins the text
    of the MediaError that is raised for an empty medium, or more than `max_bytes`.
    """
    if not 0 < len(content) <= max_bytes:
        raise MediaError(
            f"{where}: holds a medium of {len(content):,} bytes; 1 to {max_bytes:,} are allowed (`media.max_bytes`)"
        )
    name = hashlib.sha256(content).hexdigest()
    path = store_folder() / name[:2] / (name + suffix_of(content))
    if not path.is_file() or path.stat().st_size != len(content):
        write_whole(path, content)
    return path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that other processes see whole or not at all. Raises DataError if it can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError as error:
        raise DataError(f"{path}: can't be written ({error.strerror}); XDG_CACHE_HOME names another folder") from None


def data_uri_content(uri: str, where: str) -> bytes:
    """The bytes of `data:image/png;base64,...`. Raises DataError."""
    head, comma, body = uri.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        if not head.lower().endswith(";base64"):
            return unquote_to_bytes(body)
        return base64.b64decode("".join(unquote_to_bytes(body).decode("ascii").split()), validate=True)
    except (ValueError, binascii.Error) as error:
        raise DataError(f"{where}: {uri[:40]!r}... is no data URI ({error}); write data:TYPE;base64,...") from None
