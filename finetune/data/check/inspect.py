"""What can be wrong with a readable medium or text: blank, silent, clipped, decoded in the wrong encoding. And the
hashes that near-duplicates are found by.
"""

import math
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.data.media.audio import RATE
from finetune.data.sample import Medium

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

SILENT = 10 ** (-60 / 20)  # peak below -60 dB of full scale
CLIPPED = 0.001  # share of samples at full scale, in runs of at least three
SHORT_SECONDS = 0.3
BLANK = 2.0  # grey levels: standard deviation of a picture, each channel
SIDE = 8  # a picture's hash has SIDE x SIDE bits for its rows, and as many for its columns
MARGIN = 2  # grey levels: less isn't an edge but noise


class Remark(NamedTuple):
    """`code`: of `ledger.CODES`; `text`: what was measured or read."""

    code: str
    text: str


@dataclass(frozen=True)
class View:
    """A medium as it is examined. `digest`: sha256 of its file. `hash`: `picture_hash`, 16 bytes; `thumbnail`: 16 x 16
    RGB, 768 bytes; both empty for blank pictures, recordings and videos.
    """

    kind: str
    path: str
    digest: bytes
    hash: bytes = b""
    thumbnail: bytes = b""
    remarks: tuple[Remark, ...] = ()


def view(medium: Medium, decoded: Any) -> View:
    seen = View(medium.kind, str(medium.path), bytes.fromhex(medium.key))
    if medium.kind == "audio":
        return replace(seen, remarks=_sound(decoded))
    if medium.kind == "video":
        blank = all(_deviation(frame) < BLANK for frame in decoded.frames)
        return replace(seen, remarks=(Remark("blank", "every frame is of one colour"),)) if blank else seen
    if _deviation(decoded) < BLANK:
        return replace(seen, remarks=(Remark("blank", "the picture is of one colour"),))
    picture, thumbnail = picture_hash(decoded)
    return replace(seen, hash=picture, thumbnail=thumbnail)


def picture_hash(picture: "Image") -> tuple[bytes, bytes]:
    """(hash, thumbnail) of a picture. A bit of the hash says whether a region is darker than its right (lower)
    neighbour: the difference hash, in both directions (http://www.hackerfactor.com/blog/?/archives/529).
    """
    import numpy as np
    import PIL.Image

    box = PIL.Image.Resampling.BOX
    small = picture.convert("L").resize((SIDE + 1, SIDE + 1), box)
    grey = np.asarray(small, np.int16)
    rows = grey[:SIDE, 1:] > grey[:SIDE, :-1] + MARGIN
    columns = grey[1:, :SIDE] > grey[:-1, :SIDE] + MARGIN
    bits = np.concatenate([rows.ravel(), columns.ravel()])[_shuffled_bits()]
    return np.packbits(bits).tobytes(), picture.resize((16, 16), box).tobytes()


@cache
def _shuffled_bits() -> "np.ndarray":
    """Places of the bits in a random order, so that each part of the hash samples the whole picture: many pictures have
    equal margins.
    """
    import numpy as np

    return np.random.default_rng(0).permutation(2 * SIDE * SIDE)


def text_remarks(text: str) -> tuple[Remark, ...]:
    """Signs that a text was decoded in the wrong encoding."""
    if "\ufffd" in text:
        return (Remark("encoding", f"holds U+FFFD, where a character was lost: {_near(text, chr(0xFFFD))!r}"),)
    control = re.search("[\x00-\x08\x0e-\x1f\x7f-\x9f]", text)
    if control:
        return (Remark("encoding", f"holds a control character: {_near(text, control[0])!r}"),)
    if text.isascii():
        return ()
    meant = _read_as_gb(text) or _read_as_latin(text)
    if meant:
        return (Remark("encoding", f"{text[:40]!r} reads like {meant[:40]!r} in the wrong encoding"),)
    return ()


def _read_as_gb(text: str) -> str:
    """The text in UTF-8 that was read as GB 18030, or ''."""
    try:
        meant = text.encode("gb18030").decode("utf-8")
    except UnicodeError:
        return ""
    # By chance real Chinese is UTF-8 of Greek and the like, never of Chinese.
    strange = sum(not character.isascii() for character in meant)
    return meant if sum("\u2e80" <= character <= "\uffef" for character in meant) > strange / 2 else ""


def _read_as_latin(text: str) -> str:
    """The text that was read in a Western encoding, or ''."""
    from ftfy import fix_encoding
    from ftfy.badness import is_bad

    if not is_bad(text):
        return ""
    meant = fix_encoding(text)
    return meant if meant != text else ""


def _near(text: str, sign: str) -> str:
    at = text.index(sign)
    return text[max(0, at - 15) : at + 15]


def _sound(audio: "np.ndarray") -> tuple[Remark, ...]:
    import numpy as np

    remarks: list[Remark] = []
    seconds = len(audio) / RATE
    if seconds < SHORT_SECONDS:
        remarks.append(Remark("short", f"{seconds:.2f} s"))
    level = np.abs(audio)
    peak = float(level.max(initial=0.0))
    if peak < SILENT:
        remarks.append(Remark("silent", f"nothing louder than {20 * np.log10(max(peak, 1e-9)):.0f} dB"))
    else:
        # Resampling and averaging channels round clipped tops a little: near the top counts as at the top.
        full = level >= 0.99 * max(peak, 0.9)
        runs = full[2:] & full[1:-1] & full[:-2]
        if runs.mean() > CLIPPED:
            remarks.append(Remark("clipped", f"{runs.mean():.1%} of the samples are at full scale"))
    return tuple(remarks)


def _deviation(picture: "Image") -> float:
    """Standard deviation in grey levels, of the channel where it is largest."""
    import numpy as np

    counts, levels = np.array(picture.histogram(), np.int64).reshape(-1, 256), np.arange(256)
    pixels = picture.width * picture.height
    sums, squares = (counts @ levels).tolist(), (counts @ levels**2).tolist()  # whole numbers: nothing is rounded
    return math.sqrt(max((square - one**2 / pixels) / pixels for one, square in zip(sums, squares, strict=True)))
