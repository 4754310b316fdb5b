"""Small valid media of every format, spoilt at random by a seed. As a program it decodes those of some seeds:

    python fuzzed_media.py FORMAT FIRST LAST PROGRESS

It writes the seed at hand to the file PROGRESS, which is left where a decoder crashes, and prints an `Outcome` as JSON.
It exits where one seed takes longer than HUNG seconds.
"""

import faulthandler
import json
import os
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hostile_files import peak, png
from media_files import coded_sound, dicom, moov_first, picture, sine, sound, video

GREYS = range(20, 120, 10)
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
FORMATS: dict[str, tuple[str, Callable[[], bytes]]] = {
    **{form.lower(): ("image", lambda form=form: picture(form)) for form in PICTURES},
    "dcm": ("image", lambda: dicom(np.arange(600, dtype=np.uint16).reshape(20, 30))),
    "wav": ("audio", lambda: sound(sine(8000, 0.2), 8000)),
    "flac": ("audio", lambda: sound(sine(44_100, 0.2), 44_100, "FLAC")),
    "ogg": ("audio", lambda: sound(sine(44_100, 0.2), 44_100, "OGG")),
    "mp3": ("audio", lambda: sound(sine(44_100, 0.2), 44_100, "MP3")),
    "m4a": ("audio", lambda: coded_sound(seconds=0.2)),
    "webm": ("audio", lambda: coded_sound("webm", "libopus", 48_000, 0.2)),
    "mp4-video": ("video", lambda: moov_first(video(GREYS))),
    "mkv-video": ("video", lambda: video(GREYS, form="matroska")),
    "webm-video": ("video", lambda: video(GREYS, form="webm", codec="libvpx")),
    "avi-video": ("video", lambda: video(GREYS, form="avi", codec="mpeg4")),
    "ts-video": ("video", lambda: video(GREYS, form="mpegts", codec="mpeg2video")),
    "gif-video": ("video", lambda: video(GREYS, form="gif", codec="gif", pixels="rgb8")),
}
WHERE = "rows.csv:7"
FRAMES = 3
SECONDS = 2.0  # of CPU, and
MEBIBYTES = 500  # more than before: for one medium
HUNG = 30  # seconds
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
HEAD = 200  # bytes, among which headers are


@dataclass
class Outcome:
    """`wrong`: {seed: what came in place of a medium within bounds or a MediaError that names the row}; `slow` and
    `large`: {seed: CPU seconds, MiB} where they are too many.
    """

    decoded: int = 0
    refused: int = 0
    wrong: dict[int, str] = field(default_factory=dict)
    slow: dict[int, float] = field(default_factory=dict)
    large: dict[int, float] = field(default_factory=dict)


def spoilt(content: bytes, random: np.random.Generator) -> bytes:
    """Up to eight changes: bytes or whole numbers overwritten, most of them near the beginning; pieces cut out, put in
    twice or replaced by noise; the end cut off.
    """
    changed = bytearray(content)
    for _ in range(random.integers(1, 9)):
        place = int(random.integers(0, max(1, min(len(changed), HEAD) if random.random() < 0.6 else len(changed))))
        length = int(random.integers(1, 65))
        match random.integers(0, 10):
            case 0:
                del changed[place : place + length]
            case 1:
                changed[place:place] = changed[place : place + length]
            case 2:
                changed[place : place + length] = random.bytes(length)
            case 3 if random.random() < 0.3:
                del changed[max(place, 1) :]
            case 4 | 5:
                size = int(random.choice([2, 4, 8]))
                number = int(random.choice(NUMBERS)) % 256**size
                changed[place : place + size] = number.to_bytes(size, "big" if random.random() < 0.5 else "little")
            case _:
                changed[place : place + 1] = bytes([int(random.choice([0, 1, 127, 128, 255, random.integers(0, 256)]))])
    return bytes(changed)


@cache
def whole(name: str) -> bytes:
    return FORMATS[name][1]()


def seeded(name: str, seed: int) -> bytes:
    random = np.random.default_rng([seed, *name.encode()])
    if name == "png" and seed % 4 == 3:  # sound outside, as checksums refuse most others
        return png(16, 12, pixels=spoilt(bytes(12 * (1 + 16 * 3)), random))
    content = spoilt(whole(name), random)
    return with_sums(content) if name == "png" and seed % 2 else content


def with_sums(content: bytes) -> bytes:
    """Its chunks with right checksums, so that what they hold is read; what follows a broken length stays."""
    changed, place = bytearray(content), 8
    while (end := place + 8 + int.from_bytes(changed[place : place + 4], "big")) + 4 <= len(content):
        changed[end : end + 4] = zlib.crc32(changed[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(changed)


def fault_of(kind: str, content: bytes) -> str | None:
    """What is wrong with what decoding gives: '' for a medium within bounds, None for one that is refused as it should
    be.
    """
    from finetune.common.errors import MediaError
    from finetune.data.media import decode
    from finetune.data.media._source import LIMITS

    try:
        medium: Any = decode(kind, content, where=WHERE, **({"count": FRAMES} if kind == "video" else {}))
    except MediaError as error:
        return None if str(error).startswith(f"{WHERE}: ") and "\n" not in str(error) else f"MediaError {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    if kind == "audio":
        bounded = 0 < len(medium) <= 16_000 * LIMITS.max_seconds
        fine = bounded and medium.dtype == np.float32 and bool(np.isfinite(medium).all())
        return "" if fine else f"{medium.dtype} {medium.shape}"
    frames = medium.frames if kind == "video" else (medium,)
    shapes = [(frame.mode, frame.width * frame.height) for frame in frames]
    fine = 0 < len(frames) <= FRAMES and all(mode == "RGB" and 0 < size <= LIMITS.max_pixels for mode, size in shapes)
    return "" if fine else str(shapes)


def outcome_of(name: str, first: int, last: int, begin: Callable[[int], object] = lambda seed: None) -> Outcome:
    """Of the seeds from `first` up to `last`."""
    outcome, kind = Outcome(), FORMATS[name][0]
    fault_of(kind, whole(name))  # what is imported to decode isn't a medium's memory
    for seed in range(first, last):
        begin(seed)
        content = seeded(name, seed)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        memory, seconds = peak(), time.process_time()
        fault = fault_of(kind, content)
        seconds, memory = time.process_time() - seconds, peak() - memory
        outcome.decoded += fault == ""
        outcome.refused += fault is None
        if fault:
            outcome.wrong[seed] = fault
        if seconds > SECONDS:
            outcome.slow[seed] = seconds
        if memory > MEBIBYTES:
            outcome.large[seed] = memory
    return outcome


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    progress = os.open(sys.argv[4], os.O_WRONLY | os.O_CREAT)

    def begin(seed: int) -> None:
        os.pwrite(progress, b"%20d" % seed, 0)
        faulthandler.dump_traceback_later(HUNG, exit=True)

    result = outcome_of(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), begin)
    print(json.dumps(vars(result)))
