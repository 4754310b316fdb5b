"""Bounds of media to the byte, pixel and sample, and the errors beyond them, to the letter."""

import io
import os
import socket
import struct
from contextlib import nullcontext
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
import soundfile
from av.stream import Disposition
from hostile_files import encapsulated, png, wav
from media_files import coded_sound, dicom, moov_first, noise, picture, sine, sound, video

from finetune.common.errors import MediaError
from finetune.data import media as module
from finetune.data.media import _libav, _source, blank, decode, decoding, example
from finetune.data.media import dicom as dicom_module
from finetune.data.media import video as video_module
from finetune.data.media.audio import _missing, _mono, recording_of
from finetune.data.media.image import image_size, picture_of, shrunk, shrunk_size
from finetune.data.media.video import Clip, _choose, _Frames, _needed, clip_of
from finetune.recipe.schema import Limits

ANEW = "; write the file anew"


def refusal(kind: str, source: Any, limits: Limits | None = None, **options: Any) -> str:
    """The error, behind its place."""
    with pytest.raises(MediaError) as error:
        decode(kind, source, where="rows.csv:7", limits=limits or Limits(), **options)
    where, _, text = str(error.value).partition(": ")
    assert where == "rows.csv:7"
    return text


# ------------------------------------------------------------------ files


def test_files_that_are_none_are_named(tmp_path):
    assert refusal("image", tmp_path) == f"a folder, not a file: {tmp_path}"
    assert refusal("image", tmp_path / "a") == f"no such file: {tmp_path}/a"
    os.mkfifo(tmp_path / "pipe")
    assert refusal("image", tmp_path / "pipe") == f"a pipe or device, not a file: {tmp_path}/pipe"
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(tmp_path)  # names of sockets are short
        listener.bind("socket")
        os.chdir(here)
        assert refusal("audio", tmp_path / "socket") == f"a pipe or device, not a file: {tmp_path}/socket"
    assert refusal("audio", tmp_path / ("a" * 300)) == "can't be opened (File name too long)"
    assert refusal("video", tmp_path / "a\0b") == "can't be opened (embedded null byte)"


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def denied(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a").touch()
    monkeypatch.setattr(os, "open", denied)
    assert refusal("image", tmp_path / "a") == f"no permission to read it: {tmp_path}/a"


def test_a_pipe_that_takes_a_file_s_place_does_not_block(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(picture())
    real, flags = os.open, []
    monkeypatch.setattr(os, "open", lambda path, mode: flags.append(mode) or real(path, mode))
    decode("image", tmp_path / "a")
    assert flags == [os.O_RDONLY | os.O_NONBLOCK]


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_a_place_is_named_by_row_else_path_else_kind(kind, tmp_path):
    (tmp_path / "a").touch()
    names = {"image": "picture", "audio": "recording", "video": "video"}
    for source, where, name in (
        (b"", "", names[kind]),
        (tmp_path / "a", "", str(tmp_path / "a")),
        (tmp_path / "a", "rows.csv:7", "rows.csv:7"),
    ):
        with pytest.raises(MediaError) as error:
            decode(kind, source, where=where)
        assert str(error.value) == f"{name}: empty, 0 bytes{ANEW}"


def test_bytes_are_bounded_inclusively():
    content = picture()
    assert decode("image", content, limits=Limits(max_bytes=len(content)))
    message = f"{len(content):,} bytes; at most {len(content) - 1:,} are read (`media.max_bytes`)"
    assert refusal("image", content, Limits(max_bytes=len(content) - 1)) == message


def test_a_file_is_opened_at_its_beginning_and_has_no_name(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    for source in (b"content", tmp_path / "a"):
        with _source.opened(source, "a", Limits()) as file:
            assert file.read() == b"content" and not isinstance(getattr(file, "name", 0), str)
        assert file.closed


def test_reasons_are_one_line_of_200_characters():
    assert _source.reason(OSError(2, "No such\n file")) == "No such file"
    assert _source.reason(ValueError("a\n b")) == "a b"
    assert _source.reason(ValueError()) == "ValueError"
    assert len(_source.reason(ValueError("x" * 300))) == 200
    assert _source.described([1]) == "a list"
    assert _source.described(np.zeros((2, 3), np.int16)) == "an array (2, 3) of int16"


def test_seconds_and_pixels_are_bounded_inclusively():
    limits = Limits(max_seconds=1500.0, max_pixels=6000)
    _source.check_seconds(1500.0, limits, "a")
    _source.check_pixels(60, 100, limits, "a")
    with pytest.raises(MediaError) as error:
        _source.check_seconds(1500.06, limits, "a")
    assert str(error.value) == "a: 1,500.1 s or more; at most 1,500 s are read (`media.max_seconds`)"
    with pytest.raises(MediaError) as error:
        _source.check_pixels(6001, 1, limits, "a")
    assert str(error.value) == "a: 6001x1 pixels; at most 6,000 are decoded (`media.max_pixels`)"


# ------------------------------------------------------------------ of any kind


def test_the_versions_that_features_depend_on(monkeypatch):
    number = module.DECODING
    assert decoding("video") == f"{number}, av {version('av')}, pillow {version('pillow')}"
    sounds = ("soundfile", "soxr", "av")
    assert decoding("audio") == ", ".join([str(number), *(f"{name} {version(name)}" for name in sounds)])

    def without_pydicom(name: str) -> str:
        if name == "pydicom":
            raise PackageNotFoundError
        return "9"

    monkeypatch.setattr("importlib.metadata.version", without_pydicom)
    assert decoding("image") == f"{number}, pillow 9"
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9")
    assert decoding("image") == f"{number}, pillow 9, pydicom 9"


def test_examples_are_blank_and_small():
    grey, silence, clip = (example(kind) for kind in ("image", "audio", "video"))
    assert grey.size == (64, 64) and grey.mode == "RGB" and grey.getcolors() == [(64 * 64, (127, 127, 127))]
    assert silence.shape == (16_000,) and silence.dtype == np.float32 and not silence.any()
    assert clip.seconds == (0.0, 0.5) and [frame.getcolors() for frame in clip.frames] == [grey.getcolors()] * 2
    for kind, one in (("image", grey), ("audio", silence)):
        assert np.array_equal(np.asarray(blank(kind, one)), np.asarray(one))


# ------------------------------------------------------------------ pictures


def test_a_picture_s_size_is_that_of_its_header(tmp_path, monkeypatch):
    image = noise((40, 24))
    for orientation, size in ((1, (40, 24)), (4, (40, 24)), (5, (24, 40)), (8, (24, 40))):
        exif = image.getexif()
        exif[0x0112] = orientation
        content = picture("JPEG", image, exif=exif)
        assert image_size(content) == size == decode("image", content).size
    assert image_size(dicom(np.zeros((3, 5), np.int16))) == (5, 3)
    with pytest.raises(MediaError, match=r"^rows\.csv:7: not a picture in a supported format"):
        image_size(b"nonsense", where="rows.csv:7")
    with pytest.raises(MediaError, match=r"^rows\.csv:7: empty"):
        image_size(b"", where="rows.csv:7")
    monkeypatch.setattr("finetune.data.media.image.decode_image", lambda *_, **__: pytest.fail("decoded"))
    assert image_size(picture("PNG", image)) == (40, 24)


@pytest.mark.parametrize(
    "size, most, shrunk_to",
    [
        ((64, 48), None, (64, 48)),
        ((64, 48), 64 * 48, (64, 48)),
        ((64, 48), 64 * 48 - 1, (63, 47)),
        ((96, 24), 1024, (64, 16)),
        ((24, 96), 1024, (16, 64)),
        ((5000, 1), 1024, (1024, 1)),
        ((1, 5000), 1024, (1, 1024)),
        ((64, 64), 1024, (32, 32)),
    ],
)
def test_a_picture_is_shrunk_to_its_bound(size, most, shrunk_to):
    limits = Limits(shrink_to_pixels=most)
    assert shrunk_size(*size, limits) == shrunk_to
    image = PIL.Image.linear_gradient("L").resize(size).convert("RGB")
    found = shrunk(image, limits)
    assert found is image if shrunk_to == size else found.size == shrunk_to
    expected = image.resize(shrunk_to, PIL.Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    for held in (picture("PNG", image), image, np.asarray(image)):
        np.testing.assert_array_equal(np.asarray(decode("image", held, limits=limits)), np.asarray(expected))


def test_what_is_wrong_with_a_picture_is_named():
    supported = "not a picture in a supported format (PNG, JPEG, WEBP, GIF, BMP, TIFF, DICOM)"
    for content in (b"nonsense", b"P6 1 1 255\nabc"):  # the second is a portable pixmap, which Pillow reads
        assert refusal("image", content) == supported
    broken = refusal("image", picture("JPEG")[:600])
    assert broken.startswith("can't be decoded (") and broken.endswith(f"){ANEW}")
    bomb = refusal("image", png(50_000, 50_000))
    assert bomb.startswith("Image size (2500000000 pixels) exceeds limit of ")
    assert bomb.endswith(" (Pillow's bound, above `media.max_pixels`)")
    assert refusal("image", png(40, 30), Limits(max_pixels=1199)) == (
        "40x30 pixels; at most 1,199 are decoded (`media.max_pixels`)"
    )
    for value in (np.nan, np.inf):
        deep = picture("TIFF", PIL.Image.fromarray(np.array([[0, value]], np.float32)))
        assert refusal("image", deep) == "holds pixels that aren't finite numbers"


def test_a_picture_that_a_program_holds_is_taken_as_it_is_or_refused(tmp_path):
    assert picture_of(np.zeros((2, 3, 3), np.uint8)).size == (3, 2)
    expected = "; give a path, bytes of a file, a PIL image, or an array (height, width, 3) of uint8"
    for value, found in (
        (3, "a int"),
        (np.zeros((2, 3), np.uint8), "an array (2, 3) of uint8"),
        (np.zeros((2, 3, 4), np.uint8), "an array (2, 3, 4) of uint8"),
        (np.zeros((2, 3, 3), np.int8), "an array (2, 3, 3) of int8"),
    ):
        assert refusal("image", value) == found + expected
    with pytest.raises(MediaError, match=r"^picture: a int; give"):
        picture_of(3)
    assert refusal("image", PIL.Image.new("RGB", (0, 4))) == "0x4 pixels; there is nothing to see"
    assert refusal("image", noise(), Limits(max_pixels=3071)) == (
        "64x48 pixels; at most 3,071 are decoded (`media.max_pixels`)"
    )
    (tmp_path / "a.png").write_bytes(picture("PNG")[:2000])
    message = refusal("image", PIL.Image.open(tmp_path / "a.png"))
    assert message.startswith("can't be decoded (") and message.endswith(")")


# ------------------------------------------------------------------ DICOM


def grey(**elements: Any) -> bytes:
    return dicom(np.arange(100, dtype=np.int16).reshape(10, 10), **elements)


def test_what_is_wrong_with_a_dicom_file_is_named():
    assert refusal("image", dicom(None)) == "a DICOM file without pixels; remove the row"
    deflated = "a deflated DICOM file, which isn't supported; write it with another transfer syntax"
    assert refusal("image", grey().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99\0")) == deflated
    message = refusal("image", grey()[:-50])
    assert message.startswith("a DICOM file that can't be decoded (") and message.endswith(
        "); write it anew, uncompressed"
    )
    nan = dicom(np.zeros((2, 2), np.int16), RescaleSlope="1", RescaleIntercept="1")
    assert decode("image", nan).size == (2, 2)


def test_pixels_of_a_dicom_file_are_bounded_inclusively():
    content = grey()
    assert decode("image", content, limits=Limits(max_pixels=100, max_bytes=len(content)))
    assert refusal("image", content, Limits(max_pixels=99)) == (
        "10x10 pixels; at most 99 are decoded (`media.max_pixels`)"
    )
    many = grey(NumberOfFrames=100)
    assert refusal("image", many, Limits(max_bytes=19_999)) == (
        "pixels of 20,000 bytes; at most 19,999 are decoded (`media.max_bytes`)"
    )
    header = dicom(None, Rows=48, Columns=64, SamplesPerPixel=1, BitsAllocated=8, BitsStored=8, HighBit=7)
    jpeg = encapsulated(header, picture("JPEG", noise().convert("L")), "4.50")
    assert decode("image", jpeg, limits=Limits(max_bytes=max(len(jpeg), 64 * 48))).size == (64, 48)
    other = encapsulated(header, picture("JPEG", noise((32, 48)).convert("L")), "4.50")
    assert refusal("image", other) == "64x48 pixels by its header, but 32x48 in the data; write it anew"


def test_runs_longer_than_their_frame_are_refused():
    header = dicom(None, Rows=4, Columns=5, SamplesPerPixel=1, BitsAllocated=8, BitsStored=8, HighBit=7)
    message = refusal("image", encapsulated(header, bytes(106), "5"))
    assert message == "106 bytes of a frame that holds 20; write it anew"
    rle = struct.pack("<16I", 1, 64, *[0] * 14)  # one segment
    rows = b"".join(bytes([4, *range(row, row + 5)]) for row in (0, 50, 100, 150))
    values = np.array([range(row, row + 5) for row in (0, 50, 100, 150)])
    found = np.asarray(decode("image", encapsulated(header, rle + rows, "5")), int)[..., 0]
    np.testing.assert_allclose(found, values / 154 * 255, atol=0.51)


@pytest.mark.parametrize(
    "value, first", [(None, None), ("", None), (3, 3.0), ("2.5", 2.5), ([4, 5], 4.0), ([], None), (0, 0.0)]
)
def test_the_first_of_an_element_s_values(value, first):
    assert dicom_module._first(value) == first


def windowed(**elements: Any) -> list[float]:
    return dicom_module._windowed(np.array([[0.0, 10.0, 20.0, 40.0]], np.float32), elements)[0].tolist()


def test_windows_are_those_of_the_standard():
    for elements in ({}, {"WindowCenter": 5}, {"WindowWidth": 5}, {"WindowCenter": 5, "WindowWidth": 0}):
        assert windowed(**elements) == [0.0, 0.25, 0.5, 1.0]
    assert windowed(WindowCenter=20.5, WindowWidth=41) == [0.0, 0.25, 0.5, 1.0]
    assert windowed(WindowCenter=10.5, WindowWidth=1) == [0.0, 0.5, 1.0, 1.0]
    exact = {"VOILUTFunction": "LINEAR_EXACT"}
    assert windowed(WindowCenter=20, WindowWidth=40, **exact) == [0.0, 0.25, 0.5, 1.0]
    assert windowed(WindowCenter=10, WindowWidth=20, **exact) == [0.0, 0.5, 1.0, 1.0]
    steep = windowed(WindowCenter=10, WindowWidth=0.01, VOILUTFunction="SIGMOID")
    assert steep == pytest.approx([0.0, 0.5, 1.0, 1.0], abs=1e-6)


# ------------------------------------------------------------------ sound


def test_what_is_wrong_with_a_recording_is_named():
    assert refusal("audio", wav(b"")) == "empty, no sample of sound; remove the row"
    assert refusal("audio", wav(bytes(100), rate=999)) == "999 samples a second; 1,000 to 768,000 are read"
    assert refusal("audio", wav(bytes(130), channels=65, bits=8)) == "65 channels; 1 to 64 are read"
    nan = wav(np.array([0, np.nan], np.float32).tobytes(), form=3, bits=32)
    assert refusal("audio", nan) == "holds samples that aren't finite numbers; write the file anew"
    assert refusal("audio", wav(bytes(100), size=103)) == "cut off: 3 bytes or more are missing; write the file anew"
    assert refusal("audio", moov_first(video(range(20, 60, 10)))) == (
        "no sound in it (mov,mp4,m4a,3gp,3g2,mj2); remove the row"
    )
    formats = ", ".join(_libav.AUDIO)
    assert refusal("audio", picture()) == f"not in a supported format ({formats})"
    assert refusal("audio", b"nonsense" * 9).startswith(f"can't be opened as one of {formats} (")
    assert len(decode("audio", wav(bytes(2000), rate=1000))) == 16_000
    assert len(decode("audio", wav(bytes(640), channels=64, bits=8))) == 10


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "W64", "RF64"])
def test_a_recording_that_is_cut_off_is_refused_in_every_format(form):
    for frames in (5000, 5001):  # chunks of an odd size are padded
        noise = np.random.default_rng(0).integers(-100, 100, frames) / 128
        for subtype in ({"WAV": "PCM_U8", "RF64": "PCM_U8", "W64": "PCM_U8"}.get(form, "PCM_S8"), None):
            if subtype and form in ("OGG", "MP3"):
                continue
            content = sound(noise, 16_000, form, subtype)
            assert abs(len(decode("audio", content)) - frames) <= 1
            for share in (0.4, 0.9):
                assert refusal("audio", content[: int(len(content) * share)]).startswith(
                    ("cut off", "can't be decoded")
                )


def test_lengths_of_streamed_recordings_are_unknown():
    samples = np.zeros(1000)
    au = sound(samples, form="AU")
    assert len(decode("audio", au[:8] + b"\xff" * 4 + au[12:])) == 1000
    for form, mark, size in (("AIFF", b"SSND", ">I"), ("WAV", b"data", "<I")):  # as sox writes them into a pipe
        whole = sound(samples, form=form)
        at = whole.index(mark) + 4
        assert len(decode("audio", whole[:at] + struct.pack(size, 0x7F000008) + whole[at + 4 :])) == 1000
    caf = sound(samples, form="CAF")
    at = caf.index(b"data") + 4
    assert len(decode("audio", caf[:at] + b"\xff" * 8 + caf[at + 8 :])) == 1000
    w64 = bytearray(sound(samples, form="W64"))
    w64[40 + 16 : 40 + 24] = bytes(8)  # a chunk that doesn't even count itself ends no loop
    assert refusal("audio", bytes(w64)).startswith("cut off")


def test_a_recording_as_long_as_allowed_is_read():
    for make in (
        lambda seconds: sound(sine(seconds=seconds)),
        lambda seconds: coded_sound("matroska", "pcm_s16le", 16_000, seconds),
    ):
        assert len(decode("audio", make(1.0), limits=Limits(max_seconds=1.0))) == 16_000
        assert refusal("audio", make(1.1), Limits(max_seconds=1.0)) == (
            "1.1 s or more; at most 1 s are read (`media.max_seconds`)"
        )


class Sound:
    """What libsndfile opens, with as many samples as its header doesn't say."""

    def __init__(self, frames: int, samples: np.ndarray, error: BaseException | None = None) -> None:
        self.format, self.samplerate, self.channels, self.frames = "WAV", 16_000, 1, frames
        self.samples, self.error, self.start = samples, error, 0

    def __enter__(self) -> "Sound":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def read(self, count: int, dtype: str, always_2d: bool) -> np.ndarray:
        assert dtype == "float32" and always_2d
        if self.error:
            raise self.error
        block = self.samples[self.start : self.start + count, None]
        self.start += count
        return block


def test_samples_are_counted_whatever_the_header_says(monkeypatch):
    samples = np.linspace(-1, 1, 70_000, dtype=np.float32)

    def through(frames: int, error: BaseException | None = None) -> Any:
        monkeypatch.setattr(soundfile, "SoundFile", lambda file: Sound(frames, samples, error))
        return nullcontext()

    for frames in (70_000, 0, -1, 2**62, 2**63 - 1, 69_999):
        with through(frames):
            np.testing.assert_array_equal(decode("audio", wav(bytes(9))), samples)
    with through(70_001):
        assert refusal("audio", wav(bytes(9))) == "cut off: only 70,000 of 70,001 samples; write the file anew"
    with through(0):
        message = refusal("audio", wav(bytes(9)), Limits(max_seconds=4.3))
        assert message == "4.4 s or more; at most 4.3 s are read (`media.max_seconds`)"
    with through(0, RuntimeError("flac\nlost sync")):
        assert refusal("audio", wav(bytes(9))) == "can't be decoded (flac lost sync); write the file anew"


def test_a_recording_that_a_program_holds_is_taken_or_refused():
    samples = np.linspace(-2, 2, 100, dtype=np.float64)
    np.testing.assert_array_equal(recording_of((samples, 16_000)), np.clip(samples, -1, 1).astype(np.float32))
    expected = (
        "; give a path, bytes of a file, or (samples, rate): an array (samples,) of floats, and how many a second"
    )
    for value, found in (
        (samples, "an array (100,) of float64"),
        ((samples, None), "an array (100,) of float64"),
        ((samples, 16_000, 1), "a tuple"),
        ((samples[None], 16_000), "an array (1, 100) of float64"),
        ((samples.astype(np.int16), 16_000), "an array (100,) of int16"),
        (([0.0], 16_000), "a list"),
        ({"array": samples}, "a dict"),
    ):
        assert refusal("audio", value) == found + expected
    with pytest.raises(MediaError, match=r"^recording: a int; give"):
        recording_of(3)
    assert refusal("audio", (samples, 999)) == "999 samples a second; 1,000 to 768,000 are read"
    assert (
        refusal("audio", (np.zeros(1), 768_000)) == "nothing is left of it at 16,000 samples a second; remove the row"
    )


def frame(values: np.ndarray, planar: bool, channels: int) -> Any:
    return SimpleNamespace(
        to_ndarray=lambda: values,
        format=SimpleNamespace(is_planar=planar),
        layout=SimpleNamespace(nb_channels=channels),
    )


def test_every_sample_format_of_libav_becomes_the_mean_of_its_channels():
    expected = np.array([0.0, -0.5, 0.25], np.float32)
    for dtype, scale, zero in ((np.uint8, 128, 128), (np.int16, 2**15, 0), (np.int32, 2**31, 0), (np.float64, 1, 0)):
        one = (expected * scale + zero).astype(dtype)
        two = np.stack([one, np.full_like(one, zero)])  # the second is silent
        for values, planar in ((two, True), (two.T.reshape(1, -1), False)):
            found = _mono(frame(values, planar, 2))
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, expected / 2)


def test_missing_bytes_are_counted():
    whole = wav(bytes(100))
    assert [_missing(whole[: len(whole) - cut]) for cut in (0, 1, 99)] == [0, 1, 99]
    odd = whole.replace(b"data", b"LIST" + struct.pack("<I", 3) + b"abc\0data")
    assert [_missing(odd[: len(odd) - cut]) for cut in (0, 7)] == [0, 7]
    assert _missing(whole[:36]) == 8 and _missing(whole[:43]) == 8 and _missing(whole[:44]) == 100
    w64 = sound(np.zeros(100), form="W64")
    w64 = w64[:40] + struct.pack("<16sQ", b"junk", 27) + bytes(8) + w64[40:]  # 3 bytes and 5 to the next multiple of 8
    assert [_missing(w64[: len(w64) - cut]) for cut in (0, 5)] == [0, 5]
    for size in (0, 0x7FFFFFFF, 0xFFFFFFFF):
        assert _missing(wav(bytes(100), size=size)) == 0
    page = b"OggS" + bytes(22) + bytes([2, 10, 20]) + bytes(30)
    for before in (b"", page):
        lost = (0, 1, 30, 31, 32, 33, len(page) - 4)
        found = [_missing((before + page)[: len(before + page) - cut]) for cut in lost]
        assert found == [0, 1, 30, 11, 2, 1, 23]


# ------------------------------------------------------------------ video


def test_what_is_wrong_with_a_video_is_named():
    formats = ", ".join(_libav.VIDEO)
    assert refusal("video", picture()) == f"not in a supported format ({formats})"
    assert refusal("video", coded_sound()) == "no video in it (mov,mp4,m4a,3gp,3g2,mj2); remove the row"
    clip = video(range(20, 60, 10))
    advice = ": let the encoder read fewer, or raise the limit"
    assert refusal("video", clip, Limits(max_frames=3)) == (
        f"4 frames; at most 3 are decoded (`media.max_frames`){advice}"
    )
    assert len(decode("video", clip, limits=Limits(max_frames=4, max_seconds=0.4)).frames) == 4
    assert refusal("video", clip, Limits(max_seconds=0.39)) == (
        "0.4 s or more; at most 0.39 s are read (`media.max_seconds`)"
    )
    sixteen, seventeen = video([100] * 16), video([100] * 17)
    assert len(decode("video", sixteen, limits=Limits(max_pixels=64 * 48)).frames) == 16
    assert refusal("video", seventeen, Limits(max_pixels=64 * 48)) == (
        "its frames have more than 49,152 pixels together; let the encoder read fewer, or raise `media.max_pixels`"
    )
    assert refusal("video", clip, Limits(max_pixels=64 * 48 - 1)) == (
        "64x48 pixels; at most 3,071 are decoded (`media.max_pixels`)"
    )


def test_frames_that_a_program_holds_are_taken_or_refused():
    frames = np.arange(4 * 2 * 3 * 3, dtype=np.uint8).reshape(4, 2, 3, 3)
    clip = clip_of((frames, 4), count=2)
    assert clip.seconds == (0.25, 0.75) and [np.asarray(one).tolist() for one in clip.frames] == frames[1::2].tolist()
    assert clip_of((frames, 240)).seconds[1] == 1 / 240 and clip_of((frames, 0.5)).seconds == (0, 2, 4, 6)
    expected = (
        "; give a path, bytes of a file, or (frames, rate): an array (frames, height, width, 3) of uint8, and how many "
        "a second, at most 240"
    )
    array = "an array (4, 2, 3, 3) of uint8"
    for value, found in (
        (frames, array),
        ((frames, 0), array),
        ((frames, 241), array),
        ((frames, "4"), array),
        ((frames, 4, 1), "a tuple"),
        ((frames[0], 4), "an array (2, 3, 3) of uint8"),
        ((frames[..., :2], 4), "an array (4, 2, 3, 2) of uint8"),
        ((frames.astype(np.int8), 4), "an array (4, 2, 3, 3) of int8"),
        ((frames[:0], 4), "an array (0, 2, 3, 3) of uint8"),
    ):
        assert refusal("video", value) == found + expected
    with pytest.raises(MediaError, match=r"^video: a int; give"):
        clip_of(3)
    assert len(clip_of((frames, 4), limits=Limits(max_seconds=1.0, max_pixels=6, max_frames=4)).frames) == 4
    for limits, message in (
        (Limits(max_seconds=0.9), "1.0 s or more; at most 0.9 s are read (`media.max_seconds`)"),
        (Limits(max_pixels=5), "3x2 pixels; at most 5 are decoded (`media.max_pixels`)"),
        (Limits(max_frames=3), "4 frames; at most 3 are read (`media.max_frames`)"),
    ):
        assert refusal("video", (frames, 4), limits) == message
    large = np.zeros((1, 64, 64, 3), np.uint8)
    assert clip_of((large, 1), limits=Limits(shrink_to_pixels=1024)).frames[0].size == (32, 32)
    assert decode("video", video(range(20, 40, 10)), limits=Limits(shrink_to_pixels=1024)).frames[0].size == (36, 27)


def frames_at(*ticks: int, unit: Fraction = Fraction(1, 10), lasts: int = 1, keys: tuple[int, ...] = (0,)) -> _Frames:
    return _Frames(ticks, tuple(number in keys for number in range(len(ticks))), unit, True, lasts)


@pytest.mark.parametrize(
    "ticks, sampling, chosen",
    [
        ((0, 2, 1), {}, [0, 1, 2]),  # stored in another order than shown
        ((3, 3, 5), {}, [3, 5]),
        ((0, 1, 2, 3), {"count": 4}, [0, 1, 2, 3]),
        ((0, 1, 2, 3), {"count": 5}, [0, 1, 2, 3]),
        ((0, 1, 2, 3), {"count": 3}, [0, 2, 3]),
        ((0, 1, 2, 3), {"count": 1}, [2]),
        ((0, 5, 10, 15), {"per_second": 1.0}, [0, 10]),  # at 0 and 1 s
        ((0, 4, 25), {"per_second": 1.0}, [0, 4, 25]),  # at 0; the second is shown at 1 and 2 s; at 3 s the last
        ((7, 17, 27), {"per_second": 1.0}, [7, 17, 27]),  # from the first frame on
        ((0, 10), {"per_second": 0.5}, [0, 10]),  # the last lasts until 2.5 s
        ((0, 9), {"per_second": 0.5}, [0, 9]),
        ((0,), {"per_second": 3.0}, [0]),
    ],
)
def test_frames_are_chosen_by_number_or_by_time(ticks, sampling, chosen):
    lasts = 16 if ticks == (0, 10) else 12 if ticks == (0, 9) else 6 if ticks == (0, 4, 25) else 5
    sampling = {"count": None, "per_second": None} | sampling
    assert _choose(frames_at(*ticks, lasts=lasts), **sampling) == chosen


class Streams(list):
    @property
    def video(self) -> list[Any]:
        return [one for one in self if one.type == "video"]


class Film:
    """What libav opens: a video of 4x3 pixels, sound and subtitles. Packets: (stream, tick, duration, changes)."""

    def __init__(
        self, *packets: tuple[Any, ...], rate: int | None = 5, seconds: float | None = None, start: int = 0
    ) -> None:
        common = {"time_base": Fraction(1, 10), "duration": None, "codec_context": object()}
        common |= {"disposition": Disposition(0), "width": 4, "height": 3}
        common |= {"average_rate": None, "guessed_rate": rate and Fraction(rate)}
        self.streams = Streams(SimpleNamespace(type=one, **common) for one in ("video", "audio", "subtitle"))
        self.packets, self.format = packets, SimpleNamespace(name="mov,mp4")
        self.duration, self.start_time = seconds and int(seconds * 1_000_000), start * 1_000_000
        self.demuxed: list[str] = []

    def demux(self, streams: list[Any]) -> Any:
        self.demuxed = [one.type for one in streams]
        for number, (stream, tick, duration, *changes) in enumerate(self.packets):
            fields = {"size": 1, "is_corrupt": False, "is_discard": False, "is_keyframe": number == 0, "dts": tick}
            fields |= {"pts": tick, "duration": duration, "time_base": Fraction(1, 10), "stream": self.streams[stream]}
            yield SimpleNamespace(**(fields | dict(*changes)))


@pytest.fixture
def surveyed(monkeypatch):
    def survey(film: Film, limits: Limits | None = None) -> _Frames:
        monkeypatch.setattr(_libav, "container", lambda *_: nullcontext(film))
        return video_module._survey(io.BytesIO(), "a", limits or Limits())

    return survey


def test_frames_are_known_by_their_packets(surveyed):
    film = Film((0, 0, None), (1, 50, 1), (0, 2, 3), (0, 1, 4), (0, 9, 1, {"size": 0}), (0, 8, 1, {"is_discard": True}))
    assert surveyed(film) == _Frames((0, 2, 1), (True, False, False), Fraction(1, 10), True, 3)
    assert film.demuxed == ["video", "audio"]
    assert surveyed(Film((0, 7, None))) == _Frames((7,), (True,), Fraction(1, 10), True, 1)
    untimed = (0, 3, 1), (0, None, 1), (0, None, None)
    assert surveyed(Film(*untimed)) == _Frames((0, 1, 2), (True, False, False), Fraction(1, 5), False)
    assert surveyed(Film(*untimed, rate=None)).unit == Fraction(1, 25)


def test_a_film_is_cut_off_where_less_than_half_of_it_is_there(surveyed):
    assert surveyed(Film((0, 0, 1), (1, 40, 10), seconds=10.0)).ticks == (0,)  # of any stream
    for film, message in (
        (Film((0, 0, 1), (1, 39, 10), seconds=10.0), "cut off: only 4.9 of 10.0 s; write the file anew"),
        (Film((0, 20, 1), (1, 60, 9), seconds=10.0, start=2), "cut off: only 4.9 of 10.0 s; write the file anew"),
        (Film((0, 20, 5), (0, 9, 1, {"is_corrupt": True})), "cut off after 2.5 s; write the file anew"),
        (Film((1, 20, 5)), "a video without frames; remove the row"),
    ):
        with pytest.raises(MediaError) as error:
            surveyed(film)
        assert str(error.value) == f"a: {message}"
    assert surveyed(Film((0, 20, 5), (1, 9, 1, {"is_corrupt": True}))).ticks == (20,)  # sound may be damaged


def test_length_is_counted_by_frames_and_by_their_times(surveyed):
    limits = Limits(max_seconds=1.0)
    assert len(surveyed(Film(*[(0, 0, 0)] * 240), limits).ticks) == 240
    with pytest.raises(MediaError, match=r"^a: 1\.0 s or more; at most 1 s"):
        surveyed(Film(*[(0, 0, 0)] * 241), limits)
    assert surveyed(Film((0, 5, 1), (0, 15, 1)), limits).ticks == (5, 15)
    with pytest.raises(MediaError, match=r"^a: 1\.1 s or more; at most 1 s"):
        surveyed(Film((0, 5, 1), (0, 16, 1)), limits)


def test_packets_are_decoded_from_the_keyframe_before():
    known = frames_at(0, 1, 2, 3, 4, 5, 6, 7, 8, keys=(0, 3, 6))
    for chosen, needed in (
        ([4], [3, 4, 5]),
        ([0], [0, 1, 2]),
        ([2, 8], [0, 1, 2, 6, 7, 8]),
        ([], []),
        ([3, 6], [3, 4, 5, 6, 7, 8]),
    ):
        assert [number for number, one in enumerate(_needed(known, chosen)) if one] == needed
    opened = frames_at(0, 1, 4, 2, 3, 7, 5, 6, keys=(0, 2, 5))  # 2 and 3 are shown before the keyframe 4
    assert [number for number, one in enumerate(_needed(opened, [3])) if one] == [0, 1, 2, 3, 4]
    assert [number for number, one in enumerate(_needed(opened, [4])) if one] == [2, 3, 4]
    assert [number for number, one in enumerate(_needed(opened, [6])) if one] == [2, 3, 4, 5, 6, 7]
    no_keys = frames_at(0, 1, 2, keys=())
    assert _needed(no_keys, [2]) == [True] * 3


def test_the_blank_clip_keeps_sizes_and_times():
    clip = Clip((PIL.Image.new("RGB", (3, 2)), PIL.Image.new("RGB", (5, 4))), (0.0, 0.3))
    blank_one = video_module.blank_clip(clip)
    assert blank_one.seconds == (0.0, 0.3) and [one.size for one in blank_one.frames] == [(3, 2), (5, 4)]


# ------------------------------------------------------------------ containers


@pytest.mark.parametrize("kind, formats", [("audio", _libav.AUDIO), ("video", _libav.VIDEO)])
def test_containers_open_nothing_else_and_within_limits(kind, formats, monkeypatch):
    content, opened = coded_sound(), []

    def noted(file: Any, **keywords: Any) -> Any:
        opened.append((file.tell(), keywords))
        raise av.error.InvalidDataError(1, "not\nvalid")

    monkeypatch.setattr(av, "open", noted)
    message = refusal(kind, content, Limits(max_pixels=77))
    names = ", ".join(formats)
    assert message == f"can't be opened as one of {names} (not valid)"
    options = {"format_whitelist": names.replace(" ", ""), "protocol_whitelist": "none"}
    options |= {"max_pixels": "77", "max_streams": "64"}
    assert opened == [(0, {"mode": "r", "options": options, "metadata_errors": "replace"})]


def declared(name: str, stream: tuple[int | None, Fraction | None], container: int | None) -> float | None:
    opened = SimpleNamespace(format=SimpleNamespace(name=name), duration=container)
    return _libav.declared_seconds(opened, SimpleNamespace(duration=stream[0], time_base=stream[1]))


def test_the_longest_length_that_a_header_declares_counts():
    unit = Fraction(1, 1000)
    assert declared("mov,mp4,m4a", (3000, unit), 2_500_000) == 3.0
    assert declared("mov,mp4,m4a", (2000, unit), 2_500_000) == 2.5
    assert declared("wav", (None, unit), 2_500_000) == 2.5 == declared("wav", (5, None), 2_500_000)
    assert declared("wav", (3000, unit), None) == 3.0
    assert declared("wav", (None, None), None) is None
    assert declared("mp3", (3000, unit), 3_000_000) is None  # estimated


def box(kind: bytes, content: bytes = b"", large: bool = False) -> bytes:
    if large:
        return struct.pack(">I4sQ", 1, kind, 16 + len(content)) + content
    return struct.pack(">I4s", 8 + len(content), kind) + content


def check_index(content: bytes) -> None:
    _libav._check_index(io.BytesIO(content), "a")


def counting(tag: bytes, count: int) -> bytes:
    return tag + bytes(4 if tag == b"trun" else 8) + struct.pack(">I", count)


@pytest.mark.parametrize("tag", [b"stsz", b"stz2", b"trun"])
@pytest.mark.parametrize("movie", [b"moov", b"moof"])
@pytest.mark.parametrize("large", [False, True])
def test_an_index_of_more_samples_than_bytes_is_refused(tag, movie, large):
    head = box(b"ftyp", b"isom")
    size = len(head + box(movie, counting(tag, 0), large))
    check_index(head + box(movie, counting(tag, size), large))
    with pytest.raises(MediaError) as error:
        check_index(head + box(movie, counting(tag, size + 1), large))
    assert str(error.value) == f"a: its index counts {size + 1:,} samples in {size:,} bytes; write the file anew"


def test_only_the_index_of_a_movie_is_read():
    many = counting(b"stsz", 10**6)
    check_index(box(b"ftyp") + box(b"free", many))  # no movie
    check_index(box(b"mdat", many) + box(b"moov"))  # samples may look like anything
    check_index(many)
    check_index(b"\0\0\0\7moov" + box(b"moov", many))  # no box: what follows isn't either
    for content in (box(b"moov") + box(b"free", many), box(b"free", many) + box(b"moov")):
        with pytest.raises(MediaError, match="its index counts"):
            check_index(content)
    with pytest.raises(MediaError, match="its index counts"):
        check_index(box(b"moov", many) + b"\0\0\0\7 no box")
    to_the_end = struct.pack(">I4s", 0, b"moov") + many
    with pytest.raises(MediaError, match="its index counts"):
        check_index(to_the_end)
    cut = (box(b"moov", many + bytes(50)))[:-40]
    with pytest.raises(MediaError, match="its index counts"):
        check_index(cut)
    with pytest.raises(MediaError) as error:
        check_index(box(b"moov", box(b"cmov")))
    assert str(error.value) == "a: an mp4 file with a compressed index, which isn't supported; write it anew"
