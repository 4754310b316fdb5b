"""DICOM pictures through pydicom, an optional extra."""

import io
import re
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.common.errors import MediaError
from finetune.data.media import _source
from finetune.recipe.schema import Limits

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

# Inflated by pydicom at once and without bounds. The tag of the transfer syntax, its VR and length, the UID.
DEFLATED = re.compile(rb"\x02\x00\x10\x00.{4}1\.2\.840\.10008\.1\.2\.1\.99", re.DOTALL)
RLE = "1.2.840.10008.1.2.5"


def is_dicom(content: bytes, source: Path | bytes) -> bool:
    """Whether a file is DICOM: by its magic number, or by its name, as old files have none."""
    return content[128:132] == b"DICM" or (isinstance(source, Path) and source.suffix.lower() == ".dcm")


def decode_dicom(content: bytes, name: str, limits: Limits) -> "Image":
    """First frame, RGB uint8. Grey values are rescaled by slope and intercept, then by the first window (centre and
    width), or where there is none from minimum and maximum; MONOCHROME1 is inverted.

    Size is checked by the header before any pixel is decoded. Raises MediaError, also where pydicom isn't installed.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
    except ImportError:
        raise MediaError(f"{name}: a DICOM file, which needs pydicom: pip install 'finetune-kit[dicom]'") from None
    import numpy as np
    import PIL.Image

    if DEFLATED.search(content):
        raise MediaError(f"{name}: a deflated DICOM file, which isn't supported; write it with another transfer syntax")
    try:
        header = pydicom.dcmread(io.BytesIO(content), force=True)
        _check(header, name, limits)
        pixels = np.asarray(pixel_array(header, index=0))
        if header.SamplesPerPixel > 1:
            grey = pixels.astype(np.float32) / (2 ** int(header.BitsStored) - 1)
        elif header.PhotometricInterpretation == "PALETTE COLOR":
            coloured = apply_color_lut(pixels, header)
            grey = coloured.astype(np.float32) / np.iinfo(coloured.dtype).max
        else:
            grey = _windowed(apply_modality_lut(pixels, header).astype(np.float32), header)
        if not np.isfinite(grey).all():
            raise MediaError(f"{name}: holds pixels that aren't finite numbers")
        if header.PhotometricInterpretation == "MONOCHROME1":
            grey = 1 - grey
        return PIL.Image.fromarray(np.rint(np.clip(grey, 0, 1) * 255).astype(np.uint8)).convert("RGB")
    except (
        *(OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, struct.error, zlib.error),
        *(EOFError, MemoryError, ArithmeticError, RuntimeError, PIL.Image.DecompressionBombError),
        *(pydicom.errors.InvalidDicomError, pydicom.errors.BytesLengthException),
    ) as error:
        raise MediaError(
            f"{name}: a DICOM file that can't be decoded ({_source.reason(error)}); write it anew, uncompressed"
        ) from None


def _check(header: Any, name: str, limits: Limits) -> None:
    """Raises MediaError if the first frame would be too large, or has another size in its compressed form."""
    from pydicom.encaps import get_frame
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    pixel_tags = [tag for tag in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if tag in header]
    if not pixel_tags:
        raise MediaError(f"{name}: a DICOM file without pixels; remove the row")
    rows, columns, samples = int(header.Rows), int(header.Columns), int(header.SamplesPerPixel)
    frames = int(header.get("NumberOfFrames") or 1)
    _source.check_pixels(columns, rows, limits, name)
    frame = rows * columns * samples * int(header.BitsAllocated) // 8
    if "TransferSyntaxUID" not in header.file_meta:
        implicit, little = header.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    syntax = header.file_meta.TransferSyntaxUID
    # If frames are compressed, only the first is decoded.
    size = frame if syntax.is_compressed else frame * frames
    if size > limits.max_bytes:
        most = f"{limits.max_bytes:,} are decoded (`media.max_bytes`)"
        raise MediaError(f"{name}: pixels of {size:,} bytes; at most {most}")
    if syntax.is_compressed:
        _check_compressed(get_frame(header.PixelData, 0, number_of_frames=frames), rows, columns, syntax, frame, name)


def _check_compressed(stream: bytes, rows: int, columns: int, syntax: str, frame: int, name: str) -> None:
    import PIL.Image

    if syntax == RLE:
        if len(stream) > 2 * frame + 64:  # a run of n bytes never takes more than 2n; the header takes 64
            raise MediaError(f"{name}: {len(stream):,} bytes of a frame that holds {frame:,}; write it anew")
        return
    try:
        with PIL.Image.open(io.BytesIO(stream), formats=("JPEG", "JPEG2000")) as picture:
            size = picture.size
    except PIL.UnidentifiedImageError:  # JPEG-LS and others, whose decoders take no more than the header says
        return
    if size != (columns, rows):
        raise MediaError(
            f"{name}: {columns}x{rows} pixels by its header, but {size[0]}x{size[1]} in the data; write it anew"
        )


def _windowed(values: "np.ndarray", header: Any) -> "np.ndarray":
    """Grey values (rows, columns) -> 0..1, by the header's first window (PS3.3, C.11.2.1.2) or by minimum, maximum."""
    import numpy as np

    centre, width = _first(header.get("WindowCenter")), _first(header.get("WindowWidth"))
    if centre is None or width is None or width <= 0:
        low, high = float(values.min()), float(values.max())
        return (values - low) / ((high - low) or 1.0)
    function = header.get("VOILUTFunction") or "LINEAR"
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -80, 80)))
    if function == "LINEAR":
        centre, width = centre - 0.5, max(width - 1, 1e-6)
    return np.clip((values - centre) / width + 0.5, 0, 1)


def _first(value: Any) -> float | None:
    """The value of an element, or the first of several."""
    if value is None or value == "":
        return None
    return float(value) if isinstance(value, int | float | str) else (float(value[0]) if len(value) else None)
