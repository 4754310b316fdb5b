"""Videos: some frames of a clip, PIL images in RGB uint8, and their times."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from finetune.common.errors import MediaError
from finetune.data.media import _libav, _source
from finetune.data.media.image import blank_like, over_white, shrunk
from finetune.recipe.schema import Limits

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_RATE = 240  # frames a second; clips with more than so many times `max_seconds` frames are refused
CLIP_PICTURES = 16  # all decoded frames of a clip have at most so many times `max_pixels`


@dataclass(frozen=True)
class Clip:
    """`frames`: PIL images, RGB uint8; `seconds`: the time of each, from the clip's first frame on, rising."""

    frames: tuple["Image", ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class _Frames:
    """The frames of a clip by its packets, before any is decoded. `ticks`: their times in the order of the file, in
    units of `unit` seconds, or of one frame if the file has no times (not `timed`); `keys`: keyframes.
    """

    ticks: tuple[int, ...]
    keys: tuple[bool, ...]
    unit: Fraction
    timed: bool
    lasts: int = 1  # ticks of the last frame's duration


def decode_video(
    source: Path | bytes,
    *,
    where: str = "",
    limits: Limits = _source.LIMITS,
    count: int | None = None,
    per_second: float | None = None,
) -> Clip:
    """Decode some frames, upright, transparency over white: `count` of them, the middle frame of each of so many equal
    parts of the clip (all of its frames, once, where it has fewer); or those shown at 0, 1 / per_second, 2 /
    per_second, ... s, each once; or all.

    Length, size and number are checked by the header, and counted while decoding. Raises MediaError, which begins with
    `where` (file and row), for a missing, oversized, truncated or foreign file, and for more frames than the limit.
    """
    name = _source.named(source, where, "video")
    with _source.opened(source, name, limits) as file:
        known = _survey(file, name, limits)
        chosen = _choose(known, count, per_second)
        if len(chosen) > limits.max_frames:
            raise MediaError(
                f"{name}: {len(chosen):,} frames; at most {limits.max_frames:,} are decoded (`media.max_frames`): let "
                "the encoder read fewer, or raise the limit"
            )
        begin = min(known.ticks)
        frames: list[Image] = []
        seconds: list[float] = []
        pixels = 0
        for tick, frame in _decoded(file, name, known, chosen, limits):
            pixels += frame.width * frame.height
            if pixels > (most := CLIP_PICTURES * limits.max_pixels):
                raise MediaError(
                    f"{name}: its frames have more than {most:,} pixels together; let "
                    "the encoder read fewer, or raise `media.max_pixels`"
                )
            frames.append(shrunk(_picture(frame), limits))
            seconds.append(float(max(tick - begin, 0) * known.unit))
    return Clip(tuple(frames), tuple(seconds))


def clip_of(
    value: object,
    *,
    where: str = "",
    limits: Limits = _source.LIMITS,
    count: int | None = None,
    per_second: float | None = None,
) -> Clip:
    """A video that a program holds, sampled as by `decode_video`: (frames, rate), where frames are an array (frames,
    height, width, 3) of uint8, RGB, and `rate` of them are shown a second. Raises MediaError for anything else, and for
    one that is out of bounds.
    """
    import numpy as np
    import PIL.Image

    name = where or "video"
    frames: Any
    frames, rate = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if not (isinstance(frames, np.ndarray) and frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3):
        rate = None
    if not isinstance(rate, int | float) or not 0 < rate <= MAX_RATE or not frames.size:
        expected = (
            "a path, bytes of a file, or (frames, rate): an array (frames, height, width, 3) of uint8, and how many a "
            f"second, at most {MAX_RATE}"
        )
        raise MediaError(f"{name}: {_source.described(frames)}; give {expected}")
    unit = 1 / Fraction(rate).limit_denominator(1_000_000)
    _source.check_pixels(frames.shape[2], frames.shape[1], limits, name)
    _source.check_seconds(float(len(frames) * unit), limits, name)
    known = _Frames(tuple(range(len(frames))), (), unit, timed=True)
    chosen = _choose(known, count, per_second)
    if len(chosen) > limits.max_frames:
        raise MediaError(f"{name}: {len(chosen):,} frames; at most {limits.max_frames:,} are read (`media.max_frames`)")
    pictures = (shrunk(PIL.Image.fromarray(frames[n]), limits) for n in chosen)
    return Clip(tuple(pictures), tuple(float(n * unit) for n in chosen))


def blank_clip(clip: Clip) -> Clip:
    """Mid-grey frames of the same sizes at the same times."""
    return Clip(tuple(blank_like(frame) for frame in clip.frames), clip.seconds)


def _survey(file: BinaryIO, name: str, limits: Limits) -> _Frames:
    """Read the packets of the whole clip, without decoding. Raises MediaError for what is out of bounds or cut off."""
    ticks: list[int | None] = []
    keys: list[bool] = []
    last = (0, 1)  # tick and duration
    with _libav.container(file, _libav.VIDEO, limits, name) as opened:
        stream = _stream(opened, name)
        _source.check_pixels(stream.width, stream.height, limits, name)
        declared = _libav.declared_seconds(opened, stream)
        _source.check_seconds(declared or 0, limits, name)
        end = 0.0  # of any stream
        for packet in opened.demux([one for one in opened.streams if one.type in ("video", "audio")]):
            if not packet.size:
                continue
            if packet.is_corrupt and packet.stream is stream and "mov" in opened.format.name:
                raise MediaError(f"{name}: cut off after {end:,.1f} s; write the file anew")
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is not None and packet.time_base:
                end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
            if packet.stream is not stream or packet.is_discard:
                continue
            ticks.append(packet.pts)
            keys.append(packet.is_keyframe)
            if packet.pts is not None and (len(ticks) == 1 or packet.pts >= last[0]):
                last = (packet.pts, packet.duration or 1)
            _source.check_seconds(len(ticks) / MAX_RATE, limits, name)
        end -= (opened.start_time or 0) / 1_000_000
        if declared and end < declared / 2:  # the last frame of a still scene may last long
            raise MediaError(f"{name}: cut off: only {end:,.1f} of {declared:,.1f} s; write the file anew")
        unit, rate = stream.time_base, stream.average_rate or stream.guessed_rate
    if not ticks:
        raise MediaError(f"{name}: a video without frames; remove the row")
    stamps = [tick for tick in ticks if tick is not None]
    if len(stamps) == len(ticks) and unit:
        known = _Frames(tuple(stamps), tuple(keys), unit, True, last[1])
    else:
        known = _Frames(
            tuple(range(len(ticks))), (True, *[False] * (len(ticks) - 1)), 1 / (rate or Fraction(25)), False
        )
    _source.check_seconds(float((max(known.ticks) - min(known.ticks)) * known.unit), limits, name)
    return known


def _choose(known: _Frames, count: int | None, per_second: float | None) -> list[int]:
    """The ticks of the sampled frames, rising, each once."""
    ticks = sorted(set(known.ticks))
    have = len(ticks)
    if count is not None:
        return ticks if have <= count else [ticks[(2 * part + 1) * have // (2 * count)] for part in range(count)]
    if per_second is None:
        return ticks
    step = 1 / Fraction(per_second).limit_denominator(1_000_000)
    chosen: list[int] = []
    due = Fraction(ticks[0]) * known.unit
    for number, tick in enumerate(ticks):
        following = (ticks[number + 1] if number + 1 < have else tick + known.lasts) * known.unit
        if due < following:  # shown from this frame's time to the next one's
            chosen.append(tick)
            due += ((following - due) // step + (1 if (following - due) % step else 0)) * step
    return chosen


def _decoded(
    file: BinaryIO, name: str, known: _Frames, chosen: Sequence[int], limits: Limits
) -> Iterator[tuple[int, Any]]:
    """(tick, frame of libav) of each chosen frame, or of the next one if it can't be decoded."""
    waiting = list(chosen)
    last: tuple[int, Any] | None = None
    yielded = False
    with _libav.container(file, _libav.VIDEO, limits, name) as opened:
        stream = _stream(opened, name)
        for number, frame in enumerate(_frames(opened, stream, _needed(known, chosen))):
            _source.check_pixels(frame.width, frame.height, limits, name)
            tick = frame.pts if known.timed else number
            if tick is None:
                raise MediaError(f"{name}: a frame has no time; write the file anew")
            last, yielded = (tick, frame), False
            if tick >= waiting[0]:
                yielded = True
                yield tick, frame
                waiting = [one for one in waiting if one > tick]
            if not waiting:
                return
        if last is None:
            raise MediaError(f"{name}: none of its frames can be decoded; write the file anew")
        if not yielded:
            yield last


def _frames(opened: Any, stream: Any, needed: Sequence[bool]) -> Iterator[Any]:
    """Decoded frames in the order of their times, of the needed packets only."""
    feeding = False
    number = 0
    for packet in opened.demux(stream):
        if not packet.size:
            continue
        wanted = packet.is_discard or (needed[number] if number < len(needed) else False)
        number += not packet.is_discard
        if feeding and not wanted:
            yield from stream.codec_context.decode(None)
            stream.codec_context.flush_buffers()
        feeding = wanted
        if wanted:
            yield from packet.decode()
    if feeding:
        yield from stream.codec_context.decode(None)


def _needed(known: _Frames, chosen: Sequence[int]) -> list[bool]:
    """Which packets must be decoded: from the keyframe before each chosen frame to the next keyframe; from one keyframe
    earlier if the frame is displayed before its own (an open group of pictures).
    """
    wanted = set(chosen)
    starts = [number for number, key in enumerate(known.keys) if key or number == 0]
    needed = [False] * len(known.ticks)
    for group, (start, end) in enumerate(zip(starts, [*starts[1:], len(needed)], strict=True)):
        ticks = [tick for tick in known.ticks[start:end] if tick in wanted]
        if not ticks:
            continue
        first = starts[max(group - 1, 0)] if min(ticks) < known.ticks[start] else start
        needed[first:end] = [True] * (end - first)
    return needed


def _stream(opened: Any, name: str) -> Any:
    """The first video that isn't a recording's cover."""
    from av.stream import Disposition

    for stream in opened.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:
                raise MediaError(f"{name}: no decoder for its video; write it as H.264 in mp4")
            return stream
    raise MediaError(f"{name}: no video in it ({opened.format.name}); remove the row")


def _picture(frame: Any) -> "Image":
    """Upright, RGB. Its rotation is counter-clockwise, as Pillow's is."""
    transparent = any(component.is_alpha for component in frame.format.components)
    if frame.format.name == "pal8" or transparent:
        import PIL.Image

        picture = over_white(PIL.Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        picture = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
