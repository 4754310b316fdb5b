"""Malformed, truncated and hostile files, made in code. As a program it decodes what `write` has put into a folder:

    python hostile_files.py KIND FOLDER < names.json

prints {name: {type and text of the error, seconds, megabytes that the process has grown by so far}} as JSON.
"""

import io
import json
import os
import pickle
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
from media_files import coded_sound, dicom, moov_first, noise, patched, picture, sine, sound, video

Content = bytes | Callable[[Path], object]
WHERE = "rows.csv:7"
GOOD = {"image": lambda: picture(), "audio": lambda: sound(sine(44_100), 44_100), "video": lambda: moov_first(video())}


def cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "a")
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *before: bytes, pixels: bytes = b"0") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    chunks = (header, *before, chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def bomb(kind: bytes) -> Callable[[Path], object]:
    """A chunk of 200 MB of zeros, compressed when it is written."""
    return lambda path: path.write_bytes(png(4, 4, chunk(kind, b"a\0\0" + compressed_zeros())))


@cache
def compressed_zeros() -> bytes:
    return zlib.compress(bytes(200_000_000), 1)


def tiff(tags: list[tuple[int, int, int, int]], following: int = 0) -> bytes:
    """One directory of (tag, type, count, value)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", following)


def wav(
    data: bytes, *, form: int = 1, channels: int = 1, rate: int = 16_000, bits: int = 16, size: int | None = None
) -> bytes:
    align = channels * bits // 8
    head = struct.pack("<HHIIHH", form, channels, rate, rate * align & 0xFFFFFFFF, align & 0xFFFF, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", len(data) if size is None else size)
    return b"RIFF" + struct.pack("<I", len(body) + len(data)) + body + data


def floats(*values: float) -> bytes:
    samples = np.zeros(1000, np.float32)
    samples[500 : 500 + len(values)] = values
    return wav(samples.tobytes(), form=3, bits=32)


def link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def playlist(path: Path) -> None:
    """Names a good file beside it."""
    good = path.parent / "segment.ts"
    good.write_bytes(video(form="mpegts"))
    path.write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:2.0,\n{good}\n#EXT-X-ENDLIST\n"
    )


def concat(path: Path) -> None:
    good = path.parent / "other.ts"
    good.write_bytes(video(form="mpegts"))
    path.write_text(f"ffconcat version 1.0\nfile '{good}'\n")


def dash(path: Path) -> None:
    path.write_text(
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT2S" profiles="urn:mpeg:dash:profile:full:2011"><Period><AdaptationSet>'
        f'<Representation id="1" mimeType="video/mp4"><BaseURL>file://{path.parent}/segment.ts</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>"
    )


SDP = (
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\n(/etc/passwd) (r) file\nshowpage\n%%EOF\n"


def foreign(suffix: str) -> dict[str, Content]:
    """What no kind of media takes."""
    return {
        f"empty{suffix}": b"",
        f"one-byte{suffix}": b"\0",
        f"text{suffix}": b"a, b\n1, 2\n" * 99,
        f"page{suffix}": b"<!DOCTYPE html><html><body>404</body></html>",
        f"drawing{suffix}": SVG,
        f"document{suffix}": b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n",
        f"pickle{suffix}": pickle.dumps({"weights": [1.0] * 100}),
        f"archive{suffix}": zipped(),
        f"zeros{suffix}": bytes(100_000),
        f"folder{suffix}": lambda path: path.mkdir(),
        f"missing{suffix}": lambda path: None,
        f"pipe{suffix}": lambda path: os.mkfifo(path),
        f"device{suffix}": link("/dev/zero"),
        f"dangling{suffix}": link("nowhere"),
        f"circle{suffix}": lambda path: path.symlink_to(path.name),
    }


def images() -> dict[str, Content]:
    rgb = noise()
    good = {form: picture(form, rgb) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}
    size = [(256, 4, 1, 60_000), (257, 4, 1, 60_000)]
    rest = [(258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (279, 4, 1, 100)]
    scan = dicom(np.arange(600, dtype=np.uint16).reshape(20, 30))
    sixteen = dicom(None, Rows=8, Columns=8, SamplesPerPixel=1, BitsAllocated=8, BitsStored=8, HighBit=7)
    cuts = {f"cut-{share}.{form}": cut(content, share) for form, content in good.items() for share in (0.02, 0.3, 0.7)}
    return {
        **foreign(".png"),
        **cuts,
        "postscript.eps": EPS,
        "postscript.png": EPS,
        "bomb.png": png(50_000, 50_000),
        "wide.png": png(2**31 - 1, 1),
        "no-width.png": png(0, 10),
        "short-of-pixels.png": png(6000, 6000),
        "profile-bomb.png": bomb(b"iCCP"),
        "text-bomb.png": bomb(b"zTXt"),
        "no-pixels.png": good["PNG"][:33] + chunk(b"IEND", b""),
        "wrong-sum.png": good["PNG"][:29] + b"abcd" + good["PNG"][33:],
        "screen.gif": patched(good["GIF"], b"GIF87a", 0, "<HH", 65535, 65535),
        "no-frame.gif": b"GIF89a\x10\0\x10\0\x80\0\0" + bytes(6) + b";",
        "huge.tiff": tiff(size + rest),
        "circle.tiff": tiff([], following=8),
        "endless-tag.tiff": tiff([(256, 4, 2**31, 8), (257, 4, 2**31, 8), *rest]),
        "no-tags.tiff": tiff([]),
        "far.tiff": b"II*\0\xff\xff\xff\x7f",
        "canvas.webp": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0\xff\xff\xff\xff\xff\xffVP8 \0\0\0\0",
        "lying-size.webp": patched(good["WEBP"], b"\x9d\x01\x2a", 0, "<HH", 16383, 16383),
        "negative.bmp": patched(good["BMP"], b"BM", 16, "<ii", -64, -48),
        "huge.bmp": patched(good["BMP"], b"BM", 16, "<ii", 60_000, 60_000),
        "longer.bmp": patched(good["BMP"], b"BM", 16, "<ii", 4000, 4000),
        "far.bmp": patched(good["BMP"], b"BM", 8, "<I", 2**31),
        "lying-size.jpeg": patched(good["JPEG"], b"\xff\xc0", 3, ">HH", 65500, 65500),
        "start-only.jpeg": b"\xff\xd8\xff\xe0",
        "not-finite.tiff": picture("TIFF", PIL.Image.fromarray(np.array([[0.0, np.nan]], np.float32))),
        "film.png": moov_first(video()),
        "song.png": sound(sine()),
        "cut.dcm": cut(scan, 0.6),
        "head.dcm": scan[:140],
        "text.dcm": b"a, b\n1, 2\n" * 99,
        "no-pixels.dcm": dicom(None),
        "huge.dcm": dicom(np.zeros((4, 4), np.uint8), Rows=65535, Columns=65535),
        "many-frames.dcm": dicom(np.zeros((4, 4), np.uint8), NumberOfFrames=2**31 - 1),
        "larger.dcm": dicom(np.zeros((4, 4), np.uint8), Rows=400, Columns=400),
        "no-rows.dcm": dicom(np.zeros((4, 4), np.uint8), Rows=0),
        "no-samples.dcm": dicom(np.zeros((4, 4), np.uint8), SamplesPerPixel=0),
        "odd-bits.dcm": dicom(np.zeros((4, 4), np.uint8), BitsAllocated=17),
        "deflated.dcm": patched(scan, b"\x02\x00\x10\x00UI", 0, "<H22s", 22, b"1.2.840.10008.1.2.1.99"),
        "runs.dcm": encapsulated(sixteen, b"\x01\0\0\0\x40\0\0\0" + bytes(56) + b"\x81\0" * 100_000, "5"),
        "other-size.dcm": encapsulated(sixteen, picture("JPEG", noise((640, 480)).convert("L")), "4.50"),
        "no-stream.dcm": encapsulated(sixteen, b"abcd", "4.50"),
    }


def encapsulated(header: bytes, stream: bytes, syntax: str) -> bytes:
    """A header without pixels, and a compressed stream of them. `syntax`: the end of its UID."""
    import pydicom
    from pydicom.encaps import encapsulate
    from pydicom.uid import UID

    data = pydicom.dcmread(io.BytesIO(header))
    data.PixelRepresentation = 0
    data.file_meta.TransferSyntaxUID = UID(f"1.2.840.10008.1.2.{syntax}")
    data.PixelData = encapsulate([stream])
    data["PixelData"].VR = "OB"
    file = io.BytesIO()
    data.save_as(file)
    return file.getvalue()


def sounds() -> dict[str, Content]:
    tone = sine(44_100)
    second = (sine() * 32767).astype("<i2").tobytes()
    flac, ogg = sound(tone, 44_100, "FLAC"), sound(tone, 44_100, "OGG")
    opus, mp3 = sound(sine(48_000), 48_000, "OGG", "OPUS"), sound(tone, 44_100, "MP3")
    m4a, webm = coded_sound("mp4", "aac"), coded_sound("webm", "libopus", 48_000)
    cuts = {
        f"cut-{share}.{suffix}": cut(content, share)
        for suffix, content in (("wav", wav(second)), ("flac", flac), ("ogg", ogg), ("opus", opus), ("m4a", m4a))
        for share in (0.01, 0.4, 0.9)
    }
    total = flac.index(b"fLaC") + 21  # the low 32 bits of the count of samples
    return {
        **foreign(".wav"),
        **cuts,
        "cut.mp3": cut(mp3, 0.4),
        "head.mp3": mp3[:100],
        "cut.webm": cut(webm, 0.3),
        "head.webm": webm[:60],
        "lying-size.wav": wav(second, size=2**30),
        "no-channels.wav": wav(second, channels=0),
        "channels.wav": wav(second, channels=65535),
        "many-channels.wav": wav(second * 10, channels=200),
        "no-rate.wav": wav(second, rate=0),
        "slow.wav": wav(second, rate=10),
        "fast.wav": wav(second, rate=4_000_000_000),
        "no-bits.wav": wav(second, bits=0),
        "nan.wav": floats(float("nan")),
        "infinite.wav": floats(float("inf")),
        "no-samples.wav": wav(b""),
        "no-data.wav": wav(second)[:36],
        "unknown-codec.wav": wav(second, form=0x7777),
        "long.wav": wav(bytes(1_900_000), rate=1000, bits=8),
        "lying-total.flac": flac[:total] + b"\xff\xff\xff\xff" + flac[total + 4 :],
        "twice-total.flac": flac[:total] + struct.pack(">I", 88_200) + flac[total + 4 :],
        "noise.mp3": b"\xff\xfb\x90\x00" + np.random.default_rng(0).bytes(50_000),
        "tag-only.mp3": b"ID3\x04\0\0\0\0\x0f\x7f" + bytes(2000),
        "pages.ogg": ogg[:58] * 20,
        "list.m3u8": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "list.mp3": playlist,
        "concat.wav": concat,
        "session.wav": SDP,
        "picture.wav": picture(),
        "silent-film.mp4": moov_first(video()),
        "no-index.m4a": cut(m4a, 0.8),
        "index-bomb.m4a": patched(m4a, b"stsz", 4, ">II", 1, 100_000_000),
        "midi.wav": b"MThd\0\0\0\6\0\0\0\1\0\x60MTrk\0\0\0\4\0\xff\x2f\0",
    }


def videos() -> dict[str, Content]:
    mp4 = moov_first(video())
    late = video()
    mkv, webm = video(form="matroska"), video(form="webm", codec="libvpx")
    avi, flv = video(form="avi", codec="mpeg4"), video(form="flv", codec="flv")
    gif, ts = video(form="gif", codec="gif", pixels="rgb8"), video(form="mpegts")
    raw = moov_first(video(form="mov", codec="rawvideo", pixels="rgb24"))
    cuts = {
        f"cut-{share}.{suffix}": cut(content, share)
        for suffix, content in (("mp4", mp4), ("mkv", mkv), ("webm", webm), ("avi", avi), ("flv", flv))
        for share in (0.01, 0.1, 0.35)
    }
    return {
        **foreign(".mp4"),
        **cuts,
        "cut-0.9.mp4": cut(mp4, 0.9),
        "no-index.mp4": cut(late, 0.6),
        "half-index.mp4": cut(late, 0.9),
        "head.gif": gif[:30],
        "head.ts": ts[:150],
        "screen.gif": patched(gif, b"GIF89a", 0, "<HH", 65535, 65535),
        "noise.ts": b"".join(b"\x47" + np.random.default_rng(number).bytes(187) for number in range(500)),
        "noise.mpeg": b"\0\0\1\xba" + np.random.default_rng(0).bytes(50_000),
        "list.mp4": playlist,
        "list.m3u8": playlist,
        "concat.mp4": concat,
        "concat.ffconcat": concat,
        "manifest.mpd": dash,
        "session.sdp": SDP,
        "picture.mp4": picture(),
        "sound.mp4": sound(sine()),
        "song.mp4": coded_sound(),
        "index-bomb.mp4": patched(mp4, b"stsz", 4, ">II", 1, 50_000_000),
        "fragment-bomb.mp4": fragment_bomb(mp4),
        "compressed-index.mp4": mp4.replace(b"mvhd", b"cmov", 1),
        "no-samples.mp4": patched(mp4, b"stsz", 4, ">II", 0, 0),
        "huge.mov": patched(raw, b"raw ", 24, ">HH", 65535, 65535),
        "long.mp4": video(milliseconds=[1000 * second for second in range(0, 4000, 400)], greys=range(20, 120, 10)),
        "long.mkv": video(form="matroska", milliseconds=[0, 1_000, 2_000_000], greys=[20, 60, 100]),
        "lying-length.avi": patched(avi, b"strh", 36, "<I", 0x7FFFFFFF),
        "no-rate.avi": cut(patched(avi, b"strh", 24, "<II", 0, 0), 0.2),
        "endless-element.mkv": mkv[:40] + b"\x1a\x45\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xff",
    }


def fragment_bomb(mp4: bytes) -> bytes:
    """A fragment of 100 million samples, none of which has a size of its own."""

    def box(kind: bytes, *inside: bytes) -> bytes:
        return struct.pack(">I4s", 8 + sum(map(len, inside)), kind) + b"".join(inside)

    trex = box(b"trex", struct.pack(">IIIIII", 0, 1, 1, 1, 1, 0))
    (size,) = struct.unpack_from(">I", mp4, mp4.index(b"moov") - 4)
    start = mp4.index(b"moov") - 4
    moov = mp4[start + 8 : start + size]
    tfhd = box(b"tfhd", struct.pack(">II", 0x020000, 1))
    trun = box(b"trun", struct.pack(">II", 0, 100_000_000))
    return (
        mp4[:start]
        + box(b"moov", moov, box(b"mvex", trex))
        + box(b"moof", box(b"mfhd", struct.pack(">II", 0, 1)), box(b"traf", tfhd, trun))
        + mp4[start + size :]
    )


FILES = {"image": images, "audio": sounds, "video": videos}


def write(kind: str, folder: Path) -> list[str]:
    """The names of the files."""
    files = FILES[kind]()
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)
    (folder / "good.txt").write_bytes(GOOD[kind]())
    return list(files)


def measure(kind: str, folder: Path, names: list[str]) -> dict[str, dict[str, object]]:
    from finetune.common.errors import MediaError
    from finetune.data.media import decode

    decode(kind, folder / "good.txt")  # what is imported to decode isn't a file's memory
    before = peak()
    report: dict[str, dict[str, object]] = {}
    for name in names:
        begin = time.perf_counter()
        kind_of_error, text = "", ""
        try:
            decode(kind, folder / name, where=WHERE)
        except MediaError as error:
            kind_of_error, text = "MediaError", str(error)
        except BaseException as error:
            kind_of_error, text = type(error).__name__, str(error)
        seconds = time.perf_counter() - begin
        report[name] = {"type": kind_of_error, "text": text, "seconds": seconds, "megabytes": peak() - before}
    return report


def peak() -> float:
    """The most memory that this program ever held, in MiB; `resource` would include what ran before `exec`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), json.loads(sys.stdin.read()))))
