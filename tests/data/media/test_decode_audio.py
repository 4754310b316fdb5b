"""Named unlike the encoders' test_audio.py: pytest takes a file's name for its module."""

import numpy as np
import pytest
import soxr
from hostile_files import wav
from media_files import coded_sound, moov_first, sine, sound, video

from finetune.common.errors import MediaError
from finetune.data.media import DECODERS, blank, decode
from finetune.data.media.audio import decode_audio
from finetune.recipe.schema import Limits


def strongest(audio: np.ndarray) -> float:
    """Hertz of the spectrum's peak."""
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
    return float(np.argmax(spectrum)) * 16_000 / len(audio)


def is_the_sine(audio: np.ndarray, seconds: float = 1.0, amplitude: float = 0.5, within: float = 0.01) -> None:
    assert audio.dtype == np.float32 and audio.ndim == 1
    assert abs(len(audio) - 16_000 * seconds) <= 16_000 * 0.05
    middle = audio[len(audio) // 4 : -len(audio) // 4]
    assert abs(strongest(middle) - 440) <= 16_000 / len(middle)
    assert abs(np.sqrt(2) * middle.std() - amplitude) < within


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000])
def test_any_rate_becomes_16_khz(rate):
    audio = decode_audio(sound(sine(rate), rate, subtype="FLOAT"))
    assert abs(len(audio) - 16_000) <= 1
    is_the_sine(audio, within=0.002)


def test_in_blocks_it_is_what_soxr_makes_of_all_at_once():
    samples = sine(44_100, 5).astype(np.float32)  # more than three blocks
    whole = soxr.resample(samples, 44_100, 16_000)
    audio = decode_audio(sound(samples, 44_100, subtype="FLOAT"))
    assert audio.shape == whole.shape
    np.testing.assert_allclose(audio[100:-100], whole[100:-100], atol=1e-4)


def test_at_16_khz_nothing_is_changed():
    samples = sine().astype(np.float32)
    np.testing.assert_array_equal(decode_audio(sound(samples, subtype="FLOAT")), samples)


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_averaged(channels):
    factors = np.linspace(0, 1, channels)
    audio = decode_audio(sound(sine()[:, None] * factors, subtype="FLOAT"))
    np.testing.assert_allclose(audio, sine() * factors.mean(), atol=1e-6)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"])
def test_every_sample_format_of_wav(subtype):
    is_the_sine(decode_audio(sound(sine(), subtype=subtype)))


@pytest.mark.parametrize(
    ("form", "subtype"),
    [
        *(("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)),
        *(("AIFF", None), ("CAF", None), ("AU", None), ("W64", None), ("RF64", None)),
    ],
)
def test_every_format_of_libsndfile(form, subtype):
    is_the_sine(decode_audio(sound(sine(48_000), 48_000, form, subtype)))


@pytest.mark.parametrize(
    ("form", "codec", "rate"),
    [
        *(("mp4", "aac", 44_100), ("adts", "aac", 44_100), ("mpegts", "aac", 44_100), ("webm", "libopus", 48_000)),
        *(("matroska", "pcm_s16le", 44_100), ("matroska", "pcm_u8", 16_000), ("mov", "pcm_s24le", 44_100)),
        ("avi", "mp2", 44_100),
    ],
)
def test_what_libsndfile_cannot_read_goes_to_libav(form, codec, rate):
    is_the_sine(decode_audio(coded_sound(form, codec, rate)), within=0.02)


def test_amr_is_read():
    is_the_sine(decode_audio(coded_sound("amr", "libopencore_amrnb", 8000)), within=0.1)


def test_a_tenth_of_a_second_is_enough():
    assert len(decode_audio(sound(sine(8000, 0.1), 8000))) == 1600


def test_loud_samples_are_clipped():
    audio = decode_audio(sound(4 * sine(), subtype="FLOAT"))
    np.testing.assert_allclose(audio, np.clip(4 * sine(), -1, 1), atol=1e-6)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF])
def test_a_streamed_wav_does_not_know_its_length(size):
    data = (sine() * 32767).astype("<i2").tobytes()
    assert len(decode_audio(wav(data, size=size))) == 16_000


@pytest.mark.parametrize("make", [lambda: sound(sine(seconds=3)), lambda: coded_sound(seconds=3)], ids=["wav", "m4a"])
def test_length_is_bounded_by_the_header(make):
    with pytest.raises(MediaError, match=r"rows\.csv:7: 3\.0.* s or more; at most 2 s .*`media\.max_seconds`"):
        decode("audio", make(), where="rows.csv:7", limits=Limits(max_seconds=2))


def test_length_is_counted_where_no_header_tells_it():
    with pytest.raises(MediaError, match=r"at most 2 s"):
        decode("audio", coded_sound("adts", seconds=3), limits=Limits(max_seconds=2))


def test_a_film_without_sound_and_a_form_out_of_bounds_are_named():
    with pytest.raises(MediaError, match="no sound in it"):
        decode_audio(moov_first(video()))
    with pytest.raises(MediaError, match="200 channels; 1 to 64"):
        decode_audio(wav(bytes(2000), channels=200, bits=8))
    with pytest.raises(MediaError, match="10 samples a second"):
        decode_audio(wav(bytes(1000), rate=10))
    with pytest.raises(MediaError, match="finite"):
        decode_audio(wav(np.array([0, np.nan], np.float32).tobytes(), form=3, bits=32))
    with pytest.raises(MediaError, match="no sample"):
        decode_audio(wav(b""))


def test_a_file_and_its_bytes_give_the_same(tmp_path):
    for name, content in (("a.wav", sound(sine())), ("a.m4a", coded_sound())):
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(decode_audio(tmp_path / name), decode_audio(content))
        with pytest.raises(MediaError, match=rf"{name}: .* bytes; at most 10 .*`media\.max_bytes`"):
            decode("audio", tmp_path / name, limits=Limits(max_bytes=10))


def test_the_blank_is_silence_as_long():
    audio = decode_audio(sound(sine(44_100, 0.3), 44_100))
    silence = blank("audio", audio)
    assert silence.shape == audio.shape and silence.dtype == np.float32 and not silence.any()


@pytest.mark.parametrize("kind", DECODERS)
def test_every_limit_of_a_kind_reaches_its_decoder(kind, monkeypatch):
    seen = {}
    monkeypatch.setitem(DECODERS, kind, lambda source, **keywords: seen.update(keywords))
    limits = Limits(max_bytes=1, max_pixels=2, max_seconds=3.0, max_frames=4)
    decode(kind, b"", where="here", limits=limits, count=5)
    assert seen == {"where": "here", "count": 5, "limits": limits}
