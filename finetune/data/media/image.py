"""Pictures: any file that Pillow reads safely, or DICOM, to a PIL image of mode RGB, uint8."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from finetune.common.errors import MediaError
from finetune.data.media import _source
from finetune.data.media.dicom import decode_dicom, is_dicom
from finetune.recipe.schema import Limits

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# Raised by Pillow for bad files.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error),
    *(EOFError, MemoryError, OverflowError, RuntimeError, AttributeError),
)
PNG = b"\x89PNG\r\n\x1a\n"
LATE_EXIF = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # chunks that may hold EXIF or XMP
MOST_CHUNKS = 1 << 16  # that are searched
ORIENTATION = 0x0112  # the EXIF tag
SIDEWAYS = (5, 6, 7, 8)  # of them, those that swap width and height
DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # grey in more than 8 bits


def decode_image(source: Path | bytes, *, where: str = "", limits: Limits = _source.LIMITS) -> "Image":
    """Decode one picture: first frame, turned upright by its EXIF orientation, transparency over white, RGB uint8.

    Size is checked before any pixel is decoded. Raises MediaError, which begins with `where` (file and row), for a
    missing, oversized, truncated or foreign file.
    """
    name = _source.named(source, where, "picture")
    with _source.opened(source, name, limits) as file:
        content = file.read(limits.max_bytes)
    with _quiet():
        if is_dicom(content, source):
            return shrunk(decode_dicom(content, name, limits), limits)
        return shrunk(_decode(content, name, limits), limits)


def shrunk(picture: "Image", limits: Limits) -> "Image":
    """The picture, scaled down where it has more than `limits.shrink_to_pixels`."""
    import PIL.Image

    size = shrunk_size(*picture.size, limits)
    return picture if size == picture.size else picture.resize(size, PIL.Image.Resampling.LANCZOS)


def shrunk_size(width: int, height: int, limits: Limits) -> tuple[int, int]:
    """(width, height) of a picture of this size, as `shrunk` returns it."""
    most = limits.shrink_to_pixels
    if most is None or width * height <= most:
        return width, height
    scale = (most / (width * height)) ** 0.5
    # A side of one pixel stays: the other then has as many as the bound allows.
    short, long = min(width, height), max(width, height)
    sides = (max(1, int(short * scale)), min(most, int(long * scale)))
    return sides if width <= height else (sides[1], sides[0])


def image_size(source: Path | bytes, *, where: str = "") -> tuple[int, int]:
    """(width, height) in pixels of the file's picture, upright, by the header if possible. Raises MediaError."""
    import PIL.Image

    with _source.opened(source, _source.named(source, where, "picture"), _source.LIMITS) as file:
        try:
            with _quiet(), PIL.Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                sideways = _orientation(image, known=_has_no_late_exif(file)) in SIDEWAYS
                return (height, width) if sideways else (width, height)
        except (*UNREADABLE, PIL.Image.DecompressionBombError):
            pass
    return decode_image(source, where=where).size  # DICOM; or raises the reason


def _has_no_late_exif(file: IO[bytes]) -> bool:
    """Whether a file is a whole PNG without anything behind its pixels that could turn it. Pillow decodes a PNG's
    pixels to find its orientation, because a chunk with it may stand there.
    """
    place, pixels = file.tell(), False
    try:
        file.seek(0)
        if file.read(len(PNG)) != PNG:
            return False
        for _ in range(MOST_CHUNKS):
            length, kind = struct.unpack(">I4s", file.read(8))
            if kind == b"IEND":
                return pixels
            if pixels and kind in LATE_EXIF:
                return False
            pixels |= kind == b"IDAT"
            file.seek(length + 4, io.SEEK_CUR)  # 4: the checksum
        return False
    except struct.error:  # the file ends
        return False
    finally:
        file.seek(place)


def blank_like(image: "Image") -> "Image":
    """A mid-grey picture of the same size."""
    import PIL.Image

    return PIL.Image.new("RGB", image.size, (127, 127, 127))


def over_white(image: "Image") -> "Image":
    """Transparency over white, RGB."""
    import PIL.Image

    layer = image.convert("RGBA")
    white = PIL.Image.new("RGB", layer.size, "white")
    white.paste(layer, mask=layer.getchannel("A"))
    return white


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # serious faults are errors
        yield


def _decode(content: bytes, name: str, limits: Limits) -> "Image":
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _source.check_pixels(*image.size, limits, name)
            return _as_rgb(image, name)
    except PIL.Image.DecompressionBombError as error:
        raise MediaError(f"{name}: {_source.reason(error)} (Pillow's bound, above `media.max_pixels`)") from None
    except PIL.UnidentifiedImageError:
        raise MediaError(f"{name}: not a picture in a supported format ({', '.join(FORMATS)}, DICOM)") from None
    except UNREADABLE as error:
        raise MediaError(f"{name}: can't be decoded ({_source.reason(error)}); write the file anew") from None


def picture_of(value: object, *, where: str = "", limits: Limits = _source.LIMITS) -> "Image":
    """A picture that a program holds, as `decode_image` gives it: a PIL image of any mode, or an array (height, width,
    3) of uint8, RGB. Raises MediaError for anything else, and for one that is out of bounds.
    """
    import numpy as np
    import PIL.Image

    name = where or "picture"
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3:
        value = PIL.Image.fromarray(value)
    if not isinstance(value, PIL.Image.Image):
        expected = "a path, bytes of a file, a PIL image, or an array (height, width, 3) of uint8"
        raise MediaError(f"{name}: {_source.described(value)}; give {expected}")
    if 0 in value.size:
        raise MediaError(f"{name}: {value.width}x{value.height} pixels; there is nothing to see")
    _source.check_pixels(*value.size, limits, name)
    try:
        with _quiet():
            return shrunk(_as_rgb(value, name), limits)
    except UNREADABLE as error:  # PIL reads the file of an opened image only now
        raise MediaError(f"{name}: can't be decoded ({_source.reason(error)})") from None


def _as_rgb(image: "Image", name: str) -> "Image":
    image.load()
    upright = _upright(image)
    if upright.mode in DEEP:
        return _eight_bits(upright, name).convert("RGB")
    return over_white(upright) if upright.has_transparency_data else upright.convert("RGB")


def _upright(image: "Image") -> "Image":
    """The picture turned by its EXIF orientation, if that can be read."""
    import PIL.Image

    turn = PIL.Image.Transpose
    orientation = _orientation(image)
    turns: dict[Any, PIL.Image.Transpose] = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _orientation(image: "Image", known: bool = False) -> Any:
    """The EXIF tag. `known`: all that tells it has been read, so that a PNG's pixels needn't be."""
    import PIL.Image

    try:
        exif = PIL.Image.Image.getexif(image) if known else image.getexif()
        return exif.get(ORIENTATION)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error, EOFError, OverflowError):
        return None


def _eight_bits(image: "Image", name: str) -> "Image":
    """Deep grey -> mode L. 16 bits are scaled from 0..65535, floats from 0..1 or 0..255, whichever holds them all;
    other values from their minimum and maximum.
    """
    import numpy as np
    import PIL.Image

    values = np.asarray(image, dtype=np.float32)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise MediaError(f"{name}: holds pixels that aren't finite numbers")
    tops = (1.0, 255.0) if image.mode == "F" else (65535.0,)
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is None:
        values, top = values - np.float32(low), (high - low) or 1.0
    return PIL.Image.fromarray(np.rint(values * np.float32(255 / top)).astype(np.uint8))
