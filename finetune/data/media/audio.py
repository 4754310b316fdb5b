"""Recordings: any that libsndfile or libav reads, to mono, 16 kHz, float32 in [-1, 1]."""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from finetune.common.errors import MediaError
from finetune.data.media import _libav, _source
from finetune.recipe.schema import Limits

if TYPE_CHECKING:
    import numpy as np

RATE = 16_000  # samples a second, of decoded audio
RATES = (1_000, 768_000)
MAX_CHANNELS = 64
BLOCK = 65_536  # samples decoded at once
FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "MPEG", "AIFF", "AU", "CAF")
UNKNOWN = 2**62  # libsndfile's count of samples is at least so large if the header has none
STREAMED = 0x7F000000  # bytes of sound: programs that write into a pipe declare so many or more, or 0
W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"


def decode_audio(source: Path | bytes, *, where: str = "", limits: Limits = _source.LIMITS) -> "np.ndarray":
    """Decode one recording: the mean of its channels at 16 kHz, float32 (samples,) in [-1, 1].

    Length is checked by the header, and counted while decoding. Raises MediaError, which begins with `where` (file and
    row), for a missing, oversized, truncated, empty or foreign file.
    """
    import soundfile

    name = _source.named(source, where, "recording")
    with _source.opened(source, name, limits) as file:
        _check_whole(file, name)
        try:
            opened = soundfile.SoundFile(file)
        except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError, OSError):
            opened = None  # for libav
        if opened is None or opened.format not in FORMATS:
            return _through_libav(file, name, limits)
        with opened:
            return _through_sndfile(opened, name, limits)


def blank_sound(audio: "np.ndarray") -> "np.ndarray":
    """Silence of the same length."""
    import numpy as np

    return np.zeros_like(audio)


def recording_of(value: object, *, where: str = "", limits: Limits = _source.LIMITS) -> "np.ndarray":
    """A recording that a program holds, as `decode_audio` gives it: (samples, rate), where samples are an array
    (samples,) of floats in [-1, 1], or `{"array": samples, "sampling_rate": rate}`. Raises MediaError for anything
    else, and for one that is out of bounds.
    """
    import numpy as np

    name = where or "recording"
    if isinstance(value, dict) and value.keys() >= {"array", "sampling_rate"}:
        value = value["array"], value["sampling_rate"]
    samples, rate = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if not isinstance(samples, np.ndarray) or samples.ndim != 1 or samples.dtype.kind != "f" or rate is None:
        expected = "a path, bytes of a file, or (samples, rate): an array (samples,) of floats, and how many a second"
        raise MediaError(f"{name}: {_source.described(samples)}; give {expected}")
    _check_form(rate, 1, name)
    return _collect([samples.astype(np.float32)], rate, limits, name)


def _through_sndfile(opened: Any, name: str, limits: Limits) -> "np.ndarray":
    import soundfile

    _check_form(opened.samplerate, opened.channels, name)
    declared = opened.frames if 0 < opened.frames < UNKNOWN else None
    if declared:
        _source.check_seconds(declared / opened.samplerate, limits, name)

    def blocks() -> Iterator["np.ndarray"]:
        count = 0
        while len(block := opened.read(BLOCK, dtype="float32", always_2d=True)):
            count += len(block)
            yield block.mean(1)
        if declared and count < declared:
            raise MediaError(f"{name}: cut off: only {count:,} of {declared:,} samples; write the file anew")

    try:
        return _collect(blocks(), opened.samplerate, limits, name)
    except (soundfile.SoundFileError, RuntimeError, ValueError, OSError, MemoryError) as error:
        raise MediaError(f"{name}: can't be decoded ({_source.reason(error)}); write the file anew") from None


def _through_libav(file: BinaryIO, name: str, limits: Limits) -> "np.ndarray":
    with _libav.container(file, _libav.AUDIO, limits, name) as opened:
        if not opened.streams.audio:
            raise MediaError(f"{name}: no sound in it ({opened.format.name}); remove the row")
        stream = opened.streams.audio[0]
        if stream.codec_context is None:
            raise MediaError(f"{name}: no decoder for its sound; write it as WAV or FLAC")
        _check_form(stream.sample_rate or RATE, stream.channels or 1, name)
        declared = _libav.declared_seconds(opened, stream) or 0
        _source.check_seconds(declared, limits, name)
        frames = opened.decode(stream)
        first = next(frames, None)
        if first is None:
            raise MediaError(f"{name}: empty, no sample of sound")
        rate = first.sample_rate
        _check_form(rate, first.layout.nb_channels, name)

        def blocks() -> Iterator["np.ndarray"]:
            yield _mono(first)
            for frame in frames:
                if frame.sample_rate != rate:
                    raise MediaError(f"{name}: its rate changes from {rate:,} to {frame.sample_rate:,} a second")
                yield _mono(frame)

        audio = _collect(blocks(), rate, limits, name)
        if len(opened.streams) == 1 and len(audio) / RATE < declared / 2:
            raise MediaError(f"{name}: cut off: only {len(audio) / RATE:,.1f} of {declared:,.1f} s")
        return audio


def _mono(frame: Any) -> "np.ndarray":
    """A frame of libav in any sample format -> the mean of its channels, float32 (samples,)."""
    import numpy as np

    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    if values.dtype.kind == "u":
        values = (values.astype(np.float32) - 128) / 128
    elif values.dtype.kind == "i":
        values = values.astype(np.float32) / 2.0 ** (8 * values.dtype.itemsize - 1)
    mono: np.ndarray = values.mean(0, dtype=np.float32)
    return mono


def _collect(blocks: Iterable["np.ndarray"], rate: int, limits: Limits, name: str) -> "np.ndarray":
    """Mono blocks at `rate` -> one array at 16 kHz. Raises MediaError."""
    import numpy as np
    import soxr

    resampler = soxr.ResampleStream(rate, RATE, 1, dtype="float32") if rate != RATE else None
    resampled: list[np.ndarray] = []
    samples = 0
    for block in blocks:
        samples += len(block)
        _source.check_seconds(samples / rate, limits, name)
        if not np.isfinite(block).all():
            raise MediaError(f"{name}: holds samples that aren't finite numbers; write the file anew")
        resampled.append(resampler.resample_chunk(np.ascontiguousarray(block)) if resampler else block)
    if not samples:
        raise MediaError(f"{name}: empty, no sample of sound; remove the row")
    if resampler:
        resampled.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    audio = np.concatenate(resampled)
    if not len(audio) or not np.isfinite(audio).all():
        raise MediaError(f"{name}: nothing is left of it at {RATE:,} samples a second; remove the row")
    return np.clip(audio, -1, 1, out=audio)


def _check_form(rate: int, channels: int, name: str) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise MediaError(f"{name}: {rate:,} samples a second; {RATES[0]:,} to {RATES[1]:,} are read")
    if not 1 <= channels <= MAX_CHANNELS:
        raise MediaError(f"{name}: {channels:,} channels; 1 to {MAX_CHANNELS} are read")


def _check_whole(file: BinaryIO, name: str) -> None:
    """Raises MediaError for a file that is cut off, where libsndfile would read the rest as if it were all."""
    content = file.read()
    file.seek(0)
    if (missing := _missing(content)) > 0:
        raise MediaError(f"{name}: cut off: {missing:,} bytes or more are missing; write the file anew")


def _missing(content: bytes) -> int:
    """Bytes of the sound beyond the end of the file, if its format tells how many there are."""
    head, form = content[:4], content[8:12]
    if head == b"OggS":
        return _missing_of_ogg(content)
    if head in (b"RIFF", b"RF64") and form == b"WAVE":
        return _missing_of_chunk(content, b"data", 12, "<4sI")
    if head == b"FORM" and form in (b"AIFF", b"AIFC"):
        return _missing_of_chunk(content, b"SSND", 12, ">4sI")
    if head == b"caff":
        return _missing_of_chunk(content, b"data", 8, ">4sQ", align=1)
    if content.startswith(W64):
        return _missing_of_chunk(content, b"data", 40, "<16sQ", align=8, counted=24)
    if head == b".snd" and len(content) >= 12:
        begin, size = struct.unpack_from(">II", content, 4)
        return begin + size - len(content) if 0 < size < STREAMED else 0
    return 0


def _missing_of_chunk(content: bytes, sound: bytes, start: int, header: str, align: int = 2, counted: int = 0) -> int:
    """Bytes of the chunk `sound` beyond the end of the file, of chunks from `start` on. `header`: of each, its kind and
    size, in which `counted` bytes are the header's own; `align`: multiples of so many bytes at which chunks begin.
    """
    length = struct.calcsize(header) - counted
    while start + length + counted <= len(content):
        kind, size = struct.unpack_from(header, content, start)
        if kind[:4] == sound:
            if content[:4] == b"RF64" and content[12:16] == b"ds64" and size == 0xFFFFFFFF:
                (size,) = struct.unpack_from("<Q", content, 28)
            return start + length + size - len(content) if 0 < size < STREAMED else 0
        start += length + max(size, counted)
        start += -start % align
    return 8  # no such chunk at all


def _missing_of_ogg(content: bytes) -> int:
    """Bytes of the last page beyond the end of the file."""
    start = content.rfind(b"OggS")
    table = start + 27
    if table > len(content):
        return table - len(content)
    segments = content[table : table + content[table - 1]]
    return table + content[table - 1] + sum(segments) - len(content)
