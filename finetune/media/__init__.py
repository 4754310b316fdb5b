"""Media files to one canonical form each, bounded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.media.image import blank_like, decode_image

DECODERS = {"image": decode_image}
BLANKS = {"image": blank_like}


@dataclass(frozen=True)
class Limits:
    max_bytes: int = 256 * 2**20
    max_pixels: int = 64_000_000
    max_seconds: float = 1800.0
    max_frames: int = 256


def decode(kind: str, source: Path | bytes, *, where: str = "", limits: Limits = Limits(), **sampling: Any) -> Any:
    return DECODERS[kind](source, where=where)


def blank(kind: str, decoded: Any) -> Any:
    return BLANKS[kind](decoded)
