import io

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

from finetune.data.check.inspect import RATE, picture_hash, text_remarks, view
from finetune.data.sample import Medium


def drawing(seed, size=96):
    chance = np.random.default_rng(seed)
    picture = PIL.Image.new("RGB", (size, size), tuple(map(int, chance.integers(0, 255, 3))))
    draw = PIL.ImageDraw.Draw(picture)
    for _ in range(12):
        x, y = map(int, chance.integers(0, size, 2))
        draw.ellipse((x - 20, y - 14, x + 20, y + 14), fill=tuple(map(int, chance.integers(0, 255, 3))))
    return picture


def bits(left, right):
    return sum((a ^ b).bit_count() for a, b in zip(picture_hash(left)[0], picture_hash(right)[0], strict=True))


def test_a_hash_survives_what_is_done_to_pictures_and_tells_others_apart():
    for seed in range(8):
        picture = drawing(seed)
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=50)
        for other in (PIL.Image.open(content).convert("RGB"), picture.resize((64, 64)), picture.resize((200, 200))):
            assert bits(picture, other) <= 6
        assert bits(picture, drawing(seed + 100)) > 20


def test_gradients_as_computed_by_hand():
    """A picture brighter to the right: each region is darker than its right neighbour, none than its lower."""
    ramp = np.repeat(np.linspace(0, 255, 90).astype(np.uint8)[None, :, None], 90, 0).repeat(3, 2)
    hashed = picture_hash(PIL.Image.fromarray(ramp))[0]
    assert sum(byte.bit_count() for byte in hashed) == 64
    assert picture_hash(PIL.Image.fromarray(ramp[:, ::-1]))[0] == bytes(16)


def test_noise_of_one_level_is_no_edge():
    chance = np.random.default_rng(0)
    left, right = (PIL.Image.fromarray(chance.integers(99, 102, (9, 9, 3), dtype=np.uint8)) for _ in range(2))
    assert bits(left, right) == 0


@pytest.mark.parametrize(
    ("meant", "read_as"),
    [
        ("château", "cp1252"),
        ("naïve café", "latin-1"),
        ("Привет, мир", "latin-1"),
        ("你好世界", "gb18030"),
        ("一只猫坐在窗边上", "gb18030"),
        ("猫和狗", "gb18030"),  # an odd number of bytes: the last is lost
    ],
)
def test_text_read_in_the_wrong_encoding_is_found(meant, read_as):
    assert not text_remarks(meant)
    ((code, text),) = text_remarks(meant.encode("utf-8").decode(read_as, errors="replace"))
    assert code == "encoding"
    assert meant in text or "control character" in text or "U+FFFD" in text


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "联通",
        "不要钱",
        "微软",
        "表情 😀",
        "退款：动物",
        "Ünïcödé ß",
        "déjà vu — «oui»",
        "日本語のテキスト",
        "한국어",
        "x²≤3µm",
    ],
    ids=ascii,
)
def test_text_that_is_right_is_left_alone(text):
    assert not text_remarks(text)


def test_a_lost_character_is_found():
    assert text_remarks("caf\ufffd au lait")[0][0] == "encoding"
    assert text_remarks("nul \0 here")[0][0] == "encoding" and not text_remarks("tab\there\r\n")


@pytest.mark.parametrize(
    ("audio", "codes"),
    [
        (np.sin(np.arange(RATE) / 9) * 0.5, []),
        (np.zeros(RATE), ["silent"]),
        (np.full(RATE, 0.0005), ["silent"]),
        (np.sin(np.arange(RATE // 10) / 9) * 0.5, ["short"]),
        (np.clip(np.sin(np.arange(RATE) / 9) * 3, -1, 1), ["clipped"]),
        (np.zeros(0), ["short", "silent"]),
    ],
    ids=["tone", "zeros", "nearly zeros", "0.1 s", "three times too loud", "nothing"],
)
def test_sound(tmp_path, audio, codes):
    path = tmp_path / "a.wav"
    path.write_bytes(b"x")
    assert [code for code, _ in view(Medium("audio", path), audio.astype(np.float32)).remarks] == codes


def test_one_colour_is_nothing_to_see(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"x")
    seen = view(Medium("image", path), PIL.Image.new("RGB", (40, 40), (250, 250, 250)))
    assert [code for code, _ in seen.remarks] == ["blank"] and not seen.hash
    assert not view(Medium("image", path), drawing(0)).remarks
