"""Media files to one canonical form each, bounded. Nothing heavy is imported before a file is decoded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.data.media.audio import blank_sound, decode_audio
from finetune.data.media.image import blank_like, decode_image
from finetune.data.media.video import blank_clip, decode_video
from finetune.recipe.schema import Limits

DECODERS: dict[str, Callable[..., Any]] = {"image": decode_image, "audio": decode_audio, "video": decode_video}
BLANKS: dict[str, Callable[[Any], Any]] = {"image": blank_like, "audio": blank_sound, "video": blank_clip}
BOUNDS = {
    "image": ("max_bytes", "max_pixels"),
    "audio": ("max_bytes", "max_seconds"),
    "video": ("max_bytes", "max_pixels", "max_seconds", "max_frames"),
}


# Whoever changes what a decoder gives for the same file raises this: features computed before are then computed anew.
DECODING = 1
DECODED_BY = {"image": ("pillow", "pydicom"), "audio": ("soundfile", "soxr", "av"), "video": ("av", "pillow")}


def decode(kind: str, source: Path | bytes, *, where: str = "", limits: Limits | None = None, **sampling: Any) -> Any:
    """A file, or its bytes -> "image": PIL image, RGB uint8; "audio": float32 (samples,) in [-1, 1] at 16 kHz, mono;
    "video": `finetune.data.media.video.Clip`, whose frames `sampling` chooses (`decode_video` says how).

    `where` (file and row) begins the text of the MediaError that is raised for whatever can't be decoded within limits.
    """
    bounds = {name: getattr(limits or Limits(), name) for name in BOUNDS[kind]}
    return DECODERS[kind](source, where=where, **bounds, **sampling)


def decoding(kind: str) -> str:
    """What a file's decoded form depends on besides the file: our own decoder and the libraries' versions."""
    from importlib.metadata import PackageNotFoundError, version

    used = [f"{DECODING}"]
    for package in DECODED_BY[kind]:
        try:
            used.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # pydicom is optional
            continue
    return ", ".join(used)


def blank(kind: str, decoded: Any) -> Any:
    """What has the same size and length as a decoded medium, and nothing to see or hear in it."""
    return BLANKS[kind](decoded)


def example(kind: str) -> Any:
    """A small decoded medium: a grey picture, a second of silence, a clip of two grey frames."""
    import numpy as np
    import PIL.Image

    from finetune.data.media.video import Clip

    if kind == "audio":
        return np.zeros(16_000, np.float32)
    picture = PIL.Image.new("RGB", (64, 64), (127, 127, 127))
    return picture if kind == "image" else Clip((picture, picture), (0.0, 0.5))
