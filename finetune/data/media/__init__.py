"""Decoders: media files to one form per kind, within limits. Nothing heavy is imported before a file is decoded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.common.version import installed
from finetune.data.media._source import LIMITS
from finetune.data.media.audio import blank_sound, decode_audio, recording_of
from finetune.data.media.image import blank_like, decode_image, picture_of
from finetune.data.media.video import blank_clip, clip_of, decode_video
from finetune.recipe.schema import Limits

DECODERS: dict[str, Callable[..., Any]] = {"image": decode_image, "audio": decode_audio, "video": decode_video}
OBJECTS: dict[str, Callable[..., Any]] = {"image": picture_of, "audio": recording_of, "video": clip_of}
BLANKS: dict[str, Callable[[Any], Any]] = {"image": blank_like, "audio": blank_sound, "video": blank_clip}
# To be raised when a decoder's result for the same file changes: cached features are then computed anew.
DECODING = 1
DECODED_BY = {"image": ("pillow", "pydicom"), "audio": ("soundfile", "soxr", "av"), "video": ("av", "pillow")}


def decode(kind: str, source: object, *, where: str = "", limits: Limits = LIMITS, **sampling: Any) -> Any:
    """Decode a file, its bytes, or an object that a program holds (`OBJECTS`). "image": PIL image, RGB uint8; "audio":
    float32 (samples,) in [-1, 1] at 16 kHz, mono; "video": `finetune.data.media.video.Clip`, its frames chosen by
    `sampling`, as in `decode_video`.

    Raises MediaError, which begins with `where` (file and row), for a file that can't be decoded within `limits`.
    """
    decoders = DECODERS if isinstance(source, Path | bytes) else OBJECTS
    return decoders[kind](source, where=where, limits=limits, **sampling)


def decoding(kind: str) -> str:
    """The versions of our decoder and of the libraries that it calls: with them, features have to be computed anew."""
    return ", ".join([f"{DECODING}", *(f"{name} {found}" for name, found in installed(DECODED_BY[kind]).items())])


def blank(kind: str, decoded: Any) -> Any:
    """A blank medium of the same size and length: grey, or silent."""
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


def noise(kind: str, seed: int = 0) -> Any:
    """A decoded medium in which no two places are alike. Pictures have odd sizes; recordings end inside a row of
    features, at a different place for each seed.
    """
    import numpy as np
    import PIL.Image

    from finetune.data.media.video import Clip

    random = np.random.default_rng(seed)
    if kind == "audio":
        return random.uniform(-0.5, 0.5, 16_001 + 170 * seed).astype(np.float32)
    sizes = (4 if kind == "video" else 1, 60 + 7 * seed, 81, 3)
    frames = [PIL.Image.fromarray(frame) for frame in random.integers(0, 256, sizes, np.uint8)]
    return frames[0] if kind == "image" else Clip(tuple(frames), (0.0, 0.5, 1.0, 1.5))
