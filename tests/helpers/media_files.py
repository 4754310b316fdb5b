"""Well-formed media, made in code."""

import io
import struct
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import PIL.Image
import soundfile


def picture(form: str = "PNG", image: PIL.Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or noise()).save(file, form, **options)
    return file.getvalue()


def noise(size: tuple[int, int] = (64, 48)) -> PIL.Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return PIL.Image.fromarray(values)


def sine(rate: int = 16_000, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    """Amplitude 0.5."""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def sound(samples: np.ndarray, rate: int = 16_000, form: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()


def coded_sound(form: str = "mp4", codec: str = "aac", rate: int = 44_100, seconds: float = 1.0) -> bytes:
    """A sine by libav's muxers: what libsndfile doesn't write."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(sine(rate, seconds).astype(np.float32)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        fifo = av.AudioFifo()
        fifo.write(frame)
        resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=rate)
        while part := fifo.read(stream.codec_context.frame_size or 1024, partial=True):
            for one in resampler.resample(part):
                container.mux(stream.encode(one))
        container.mux(stream.encode(None))
    return file.getvalue()


def video(
    greys: Sequence[int] = range(20, 220, 10),
    form: str = "mp4",
    codec: str = "libx264",
    *,
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    pixels: str = "yuv420p",
    milliseconds: Sequence[int] | None = None,
    rotation: int = 0,
    options: dict[str, str] | None = None,
) -> bytes:
    """Frames of one grey each, `rate` a second, or at `milliseconds`; a keyframe every 5."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.gop_size = 5
        if rotation:
            stream.set_display_rotation(rotation)
        if milliseconds:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, grey in enumerate(greys):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), grey, np.uint8)).reformat(format=pixels)
            if milliseconds:
                frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def patched(content: bytes, tag: bytes, offset: int, form: str, *values: int) -> bytes:
    """Overwrite what stands `offset` bytes after the first `tag`'s end."""
    at = content.index(tag) + len(tag) + offset
    new = struct.pack(form, *values)
    return content[:at] + new + content[at + len(new) :]


def moov_first(content: bytes) -> bytes:
    """An mp4 whose index stands before its frames."""
    boxes, start = {}, 0
    while start < len(content):
        (size,) = struct.unpack_from(">I", content, start)
        boxes[content[start + 4 : start + 8]] = content[start : start + size]
        start += size
    moov, moved = boxes[b"moov"], len(boxes[b"moov"])
    at = moov.index(b"stco") + 8
    (count,) = struct.unpack_from(">I", moov, at)
    offsets = struct.unpack_from(f">{count}I", moov, at + 4)
    moov = patched(moov, b"stco", 8, f">{count}I", *[offset + moved for offset in offsets])
    return boxes.pop(b"ftyp") + moov + b"".join(box for kind, box in boxes.items() if kind != b"moov")


def dicom(
    pixels: np.ndarray | None, *, syntax: str = "1.2.840.10008.1.2.1", photometric: str = "MONOCHROME2", **elements
) -> bytes:
    """`pixels` (rows, columns), (frames, rows, columns) or, with an RGB photometric, (rows, columns, 3)."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(syntax)
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["fixed"])
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.PhotometricInterpretation = photometric
    if pixels is not None:
        coloured = photometric in ("RGB", "YBR_FULL")
        shape = pixels.shape if coloured else pixels.shape[-2:]
        data.Rows, data.Columns = shape[:2]
        data.SamplesPerPixel = 3 if coloured else 1
        if coloured:
            data.PlanarConfiguration = 0
        if pixels.ndim == 3 and not coloured:
            data.NumberOfFrames = len(pixels)
        data.BitsAllocated = data.BitsStored = 8 * pixels.dtype.itemsize
        data.HighBit = data.BitsStored - 1
        data.PixelRepresentation = int(pixels.dtype.kind == "i")
        data.PixelData = pixels.tobytes()
    for key, value in elements.items():
        setattr(data, key, value)
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()
