"""Media files to one canonical form each, bounded."""

from pathlib import Path
from typing import Any

from finetune.media.image import blank_like, decode_image

DECODERS = {"image": decode_image}
BLANKS = {"image": blank_like}


def decode(kind: str, source: Path | bytes, where: str = "") -> Any:
    """The canonical form of a medium: an image is a PIL image, RGB. Raises MediaError."""
    return DECODERS[kind](source, where=where)
