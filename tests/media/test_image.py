import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from finetune.errors import MediaError
from finetune.media.image import blank_like, decode_image


def saved(image: PIL.Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_becomes_rgb(form):
    image = decode_image(saved(PIL.Image.new("RGB", (40, 30), (200, 30, 30)), form))
    assert image.mode == "RGB"
    assert np.allclose(np.asarray(image, dtype=int), (200, 30, 30), atol=6)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "YCbCr", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    form = "TIFF" if mode in ("CMYK", "YCbCr", "F", "I") else "PNG"
    assert decode_image(saved(PIL.Image.new(mode, (8, 6)), form)).mode == "RGB"


def test_sixteen_bits_are_scaled_not_clipped():
    gradient = PIL.Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0))
    row = np.asarray(decode_image(saved(gradient)))[0, :, 0]
    assert abs(int(row[128]) - 128) <= 1 and row[0] == 0 and row[-1] == 255


def test_transparency_lies_over_white():
    assert decode_image(saved(PIL.Image.new("RGBA", (4, 4), (10, 20, 30, 0)))).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_turns_the_picture_upright():
    picture = PIL.Image.new("RGB", (40, 20))
    exif = picture.getexif()
    exif[0x0112] = 6
    assert decode_image(saved(picture, "JPEG", exif=exif)).size == (20, 40)


def bomb() -> bytes:
    """A PNG header that promises 50,000 × 50,000 pixels, and a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


good = saved(PIL.Image.effect_noise((64, 64), 50))


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", good[:100], good[: len(good) // 2], bomb(), b"<svg/>", b"%PDF-1.7", good[:40] + b"\0" * 500],
    ids=["empty", "text", "header", "half", "bomb", "svg", "pdf", "zeros"],
)
def test_what_is_no_picture_is_named(content):
    with pytest.raises(MediaError, match=r"rows\.csv:3"):
        decode_image(content, where="rows.csv:3")


def test_bounds_are_checked_before_pixels():
    with pytest.raises(MediaError, match=r"64x64 pixels; at most 4,000"):
        decode_image(good, max_pixels=4000)


def test_large_and_missing_files_are_refused_by_name(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(good)
    with pytest.raises(MediaError, match=r"a\.png: .* bytes; at most 10"):
        decode_image(path, max_bytes=10)
    with pytest.raises(MediaError, match="no such file"):
        decode_image(tmp_path / "b.png")


def test_a_blank_picture_shows_nothing():
    blank = blank_like(PIL.Image.effect_noise((30, 20), 80).convert("RGB"))
    assert blank.size == (30, 20) and len(blank.getcolors()) == 1
