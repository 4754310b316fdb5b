"""Containers through PyAV: of known formats, within limits, and nothing is read but the file itself."""

import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from finetune.common.errors import MediaError
from finetune.data.media import _source
from finetune.recipe.schema import Limits

if TYPE_CHECKING:
    from av.container import InputContainer

VIDEO = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "ogg", "gif", "asf")
AUDIO = (*VIDEO, "wav", "w64", "mp3", "flac", "aac", "amr", "aiff", "caf", "ac3", "eac3", "au", "ape", "wv", "tta")
# Their headers hold the length; for other formats libav estimates it from the bit rate of the first packets.
DECLARING = ("mov", "matroska", "avi", "flv", "asf", "wav", "w64", "flac", "aiff", "caf")
# Raised by PyAV for bad files, besides its own FFmpegError.
RAISED = (OSError, ValueError, LookupError, EOFError, MemoryError, ArithmeticError, RuntimeError, AttributeError)

# Boxes of mp4 that hold a count of samples, for each of which libav reserves 24 bytes.
COUNTING = re.compile(rb"stsz.{8}(?P<sizes>.{4})|stz2.{8}(?P<small>.{4})|trun.{4}(?P<run>.{4})", re.DOTALL)


@contextmanager
def container(file: BinaryIO, formats: tuple[str, ...], limits: Limits, name: str) -> Iterator["InputContainer"]:
    """Open a container. Playlists and other files that name files or addresses are refused, by their format, and as no
    protocol is allowed. Errors of libav inside become MediaError.
    """
    import av

    _check_index(file, name)
    options = {
        "format_whitelist": ",".join(formats),
        "protocol_whitelist": "none",
        "max_pixels": str(limits.max_pixels),
        "max_streams": "64",
    }
    file.seek(0)
    try:
        opened = av.open(file, mode="r", options=options, metadata_errors="replace")
    except av.ArgumentError:  # raised by libav for a format that isn't in the list
        raise MediaError(f"{name}: not in a supported format ({', '.join(formats)})") from None
    except (av.FFmpegError, *RAISED) as error:
        raise MediaError(f"{name}: can't be opened as one of {', '.join(formats)} ({_source.reason(error)})") from None
    try:
        with opened:
            for stream in opened.streams:
                if stream.type == "video" and stream.codec_context is not None:
                    stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
            yield opened
    except (av.FFmpegError, *RAISED) as error:
        raise MediaError(f"{name}: can't be decoded ({_source.reason(error)}); write the file anew") from None


def declared_seconds(opened: "InputContainer", stream: Any) -> float | None:
    """The length in seconds by the header, if it has one."""
    if not set(opened.format.name.split(",")) & set(DECLARING):
        return None
    lengths = [stream.duration * stream.time_base] if stream.duration and stream.time_base else []
    lengths += [opened.duration / 1_000_000] if opened.duration else []
    return float(max(lengths)) if lengths else None


def _check_index(file: BinaryIO, name: str) -> None:
    """Raises MediaError for an mp4 file whose index counts more samples than the file has bytes, or is compressed."""
    size = file.seek(0, os.SEEK_END)
    spans, movie, start = [], False, 0
    while start + 8 <= size:
        file.seek(start)
        header = file.read(16)
        length, kind = struct.unpack_from(">I4s", header)
        if length == 1 and len(header) == 16:
            (length,) = struct.unpack_from(">Q", header, 8)
        length = size - start if length == 0 else length
        if length < 8:
            break
        movie = movie or kind in (b"moov", b"moof")
        if kind != b"mdat":
            spans.append((start, min(length, size - start)))
        start += length
    for start, length in spans if movie else ():
        file.seek(start)
        box = file.read(length)
        if b"cmov" in box:
            raise MediaError(f"{name}: an mp4 file with a compressed index, which isn't supported; write it anew")
        for match in COUNTING.finditer(box):
            (count,) = struct.unpack(">I", match["sizes"] or match["small"] or match["run"])
            if count > size:
                raise MediaError(f"{name}: its index counts {count:,} samples in {size:,} bytes; write the file anew")
