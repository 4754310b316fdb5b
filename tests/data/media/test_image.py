import io
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from PIL.PngImagePlugin import PngImageFile

from finetune.common.errors import MediaError
from finetune.data.media.image import blank_like, decode_image, image_size
from finetune.recipe.schema import Limits


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
    packing = {"compression": "tiff_lzw"} if mode == "YCbCr" else {}  # Pillow 11 can't read what it writes without one
    assert decode_image(saved(PIL.Image.new(mode, (8, 6)), form, **packing)).mode == "RGB"


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


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_what_pillow_makes_of_it(form, orientation):
    picture = PIL.Image.linear_gradient("L").resize((40, 24)).convert("RGB")
    picture.putpixel((0, 0), (255, 0, 0))
    exif = picture.getexif()
    exif[0x0112] = orientation
    content = saved(picture, form, exif=exif)
    expected = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(content))).convert("RGB")
    found = decode_image(content)
    assert found.size == ((40, 24) if orientation < 5 else (24, 40))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_exif_that_is_broken_turns_nothing():
    assert decode_image(saved(PIL.Image.new("RGB", (40, 20)), "JPEG", exif=b"Exif\0\0II*\0abcdefgh")).size == (40, 20)


def test_half_transparency_is_half_white():
    colours = decode_image(saved(PIL.Image.new("RGBA", (4, 4), (100, 0, 200, 51)))).getpixel((1, 1))
    np.testing.assert_allclose(colours, [0.2 * value + 0.8 * 255 for value in (100, 0, 200)], atol=1)
    grey = decode_image(saved(PIL.Image.new("LA", (4, 4), (100, 51)))).getpixel((1, 1))
    np.testing.assert_allclose(grey, [0.2 * 100 + 0.8 * 255] * 3, atol=1)


def test_a_palette_gives_its_colours_and_its_transparency():
    picture = PIL.Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 0])
    picture.putpixel((1, 0), 1)
    for form in ("PNG", "GIF"):
        found = decode_image(saved(picture, form, transparency=0))
        assert [found.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 0)]
    assert decode_image(saved(picture, "PNG")).getpixel((0, 0)) == (10, 20, 30)


def test_cmyk_is_turned_into_light():
    for form in ("TIFF", "JPEG"):
        found = decode_image(saved(PIL.Image.new("CMYK", (16, 16), (255, 0, 0, 0)), form)).getpixel((8, 8))
        np.testing.assert_allclose(found, (0, 255, 255), atol=4)


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.float32, [0, 0.5, 1], [0, 128, 255]),
        (np.float32, [0, 100, 200], [0, 100, 200]),
        (np.float32, [-1000, 0, 1000], [0, 128, 255]),
        (np.int32, [0, 257 * 100, 65535], [0, 100, 255]),
        (np.int32, [-100_000, 0, 100_000], [0, 128, 255]),
        (np.uint16, [0, 257 * 100, 65535], [0, 100, 255]),
    ],
)
def test_deep_grey_is_scaled(dtype, values, expected):
    found = np.asarray(decode_image(saved(PIL.Image.fromarray(np.array([values], dtype)), "TIFF")))
    np.testing.assert_array_equal(found, np.repeat(np.array(expected, np.uint8)[None, :, None], 3, 2))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_taken(form):
    frames = [PIL.Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    assert decode_image(saved(frames[0], form, save_all=True, append_images=frames[1:])).getpixel((1, 1))[0] > 200


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("size", [(1, 1), (8, 400), (400, 8)])
def test_odd_shapes_are_kept(form, size):
    assert decode_image(saved(PIL.Image.new("RGB", size, "red"), form)).size == size


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
        decode_image(good, limits=Limits(max_pixels=4000))


def test_large_and_missing_files_are_refused_by_name(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(good)
    with pytest.raises(MediaError, match=r"a\.png: .* bytes; at most 10"):
        decode_image(path, limits=Limits(max_bytes=10))
    with pytest.raises(MediaError, match="no such file"):
        decode_image(tmp_path / "b.png")


def test_a_blank_picture_shows_nothing():
    blank = blank_like(PIL.Image.effect_noise((30, 20), 80).convert("RGB"))
    assert blank.size == (30, 20) and len(blank.getcolors()) == 1


def test_the_size_of_a_png_is_read_without_its_pixels_unless_a_chunk_behind_them_may_turn_it(monkeypatch):
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    wide = PIL.Image.new("RGB", (40, 30))
    files = {"plain": saved(wide), "turned": saved(wide, exif=turned)}
    begin = files["turned"].index(b"eXIf") - 4
    (length,) = struct.unpack_from(">I", files["turned"], begin)
    chunk = files["turned"][begin : begin + length + 12]
    end = files["plain"].index(b"IEND") - 4
    files["late"] = files["plain"][:end] + chunk + files["plain"][end:]
    files["cut"] = files["late"][: end + 8]
    expected = {"plain": (40, 30), "turned": (30, 40), "late": (30, 40), "cut": (40, 30)}
    assert {name: image_size(content) for name, content in files.items()} == expected
    assert all(decode_image(files[name]).size == expected[name] for name in ("plain", "turned", "late"))
    monkeypatch.setattr(PngImageFile, "load", None)
    assert {name: image_size(files[name]) for name in ("plain", "turned")} == {"plain": (40, 30), "turned": (30, 40)}
    with pytest.raises(TypeError):
        PIL.Image.open(io.BytesIO(files["late"])).getexif()
