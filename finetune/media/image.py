"""Images: any file Pillow reads safely, to one canonical form: PIL image, mode RGB, 8 bits a channel."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 10**6


def decode_image(
    source: Path | bytes, *, where: str = "", max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> "Image":
    """Decode one picture: first frame, turned upright by its EXIF orientation, transparency over white, RGB uint8.

    Size is checked before any pixel is decoded. `where` (file and row) goes into the error.
    Raises MediaError for a missing, oversized, truncated or foreign file.
    """
    import PIL.Image
    from PIL import ImageOps

    name = where or (str(source) if isinstance(source, Path) else "picture")
    try:
        if isinstance(source, Path):
            size = source.stat().st_size
            if size > max_bytes:
                raise MediaError(f"{name}: {size:,} bytes; at most {max_bytes:,} are read")
            source = source.read_bytes()
        with PIL.Image.open(io.BytesIO(source), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise MediaError(f"{name}: {width}x{height} pixels; at most {max_pixels:,} are decoded")
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits: scale, where convert("RGB") would clip everything above 255
                upright = upright.convert("I").point(lambda value: value / 257).convert("L")
            if upright.has_transparency_data:
                layer = upright.convert("RGBA")
                white = PIL.Image.new("RGBA", layer.size, "white")
                upright = PIL.Image.alpha_composite(white, layer)
            return upright.convert("RGB")
    except FileNotFoundError as error:
        raise MediaError(f"{name}: no such file: {error.filename}") from None
    except MediaError:
        raise
    except PIL.UnidentifiedImageError:
        raise MediaError(f"{name}: not a picture that is read here ({', '.join(FORMATS)})") from None
    except (OSError, SyntaxError, ValueError, MemoryError, EOFError, PIL.Image.DecompressionBombError) as error:
        raise MediaError(f"{name}: can't be decoded ({str(error) or type(error).__name__})") from None


def blank_like(image: "Image") -> "Image":
    """A mid-grey picture of the same size: what is left when there is nothing to see."""
    import PIL.Image

    return PIL.Image.new("RGB", image.size, (127, 127, 127))
