"""Whatever a file holds: a medium, or a MediaError that names it, soon and in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile_files
import numpy as np
import pytest
from media_files import coded_sound, dicom, moov_first, picture, sine, sound, video

import finetune
from finetune.common.errors import MediaError
from finetune.data.media import decode

pytestmark = pytest.mark.slow

NAMES = {kind: list(files()) for kind, files in hostile_files.FILES.items()}
PROGRAM = Path(hostile_files.__file__)
SECONDS = 2
MEGABYTES = 500


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict:
    """By kind, what one process per kind made of its files, one after another."""
    found = {}
    environment = {**os.environ, "PYTHONPATH": str(Path(finetune.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    for kind in NAMES:
        folder = tmp_path_factory.mktemp(kind)
        names = hostile_files.write(kind, folder)
        done = subprocess.run(
            [sys.executable, str(PROGRAM), kind, str(folder)],
            input=json.dumps(names),
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        found[kind] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_a_hostile_file_is_refused_by_name_soon_and_in_little_memory(reports, kind, name):
    report = reports[kind][name]
    assert report["type"] == "MediaError", report
    where, _, reason = report["text"].partition(": ")
    assert where == hostile_files.WHERE and len(reason) > 10 and "\n" not in reason
    assert report["seconds"] < SECONDS
    assert report["megabytes"] < MEGABYTES


def test_there_are_many():
    assert sum(map(len, NAMES.values())) >= 150


def test_ghostscript_is_never_called(monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a program"))
    (tmp_path / "a.png").write_bytes(hostile_files.EPS)
    with pytest.raises(MediaError, match="not a picture"):
        decode("image", tmp_path / "a.png")


SOUND = {
    "wav": lambda: sound(sine(8000, 0.2), 8000),
    "flac": lambda: sound(sine(44_100, 0.2), 44_100, "FLAC"),
    "ogg": lambda: sound(sine(44_100, 0.2), 44_100, "OGG"),
    "mp3": lambda: sound(sine(44_100, 0.2), 44_100, "MP3"),
    "m4a": lambda: coded_sound(seconds=0.2),
    "webm": lambda: coded_sound("webm", "libopus", 48_000, 0.2),
}
PICTURES = {form.lower(): lambda form=form: picture(form) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}
PICTURES["dcm"] = lambda: dicom(np.arange(600, dtype=np.uint16).reshape(20, 30))
VIDEOS = {
    "mp4": lambda: moov_first(video(range(20, 120, 10))),
    "mkv": lambda: video(range(20, 120, 10), form="matroska"),
    "webm": lambda: video(range(20, 120, 10), form="webm", codec="libvpx"),
    "avi": lambda: video(range(20, 120, 10), form="avi", codec="mpeg4"),
    "ts": lambda: video(range(20, 120, 10), form="mpegts", codec="mpeg2video"),
    "gif": lambda: video(range(20, 120, 10), form="gif", codec="gif", pixels="rgb8"),
}
MUTABLE = {
    **{name: ("image", make) for name, make in PICTURES.items()},
    **{name: ("audio", make) for name, make in SOUND.items()},
    **{f"{name}-video": ("video", make) for name, make in VIDEOS.items()},
}
MUTATIONS = 40


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """One to eight bytes overwritten, most of them near the beginning, where headers are."""
    changed = bytearray(content)
    for _ in range(random.integers(1, 9)):
        end = min(len(changed), 200) if random.random() < 0.6 else len(changed)
        changed[random.integers(0, end)] = random.choice([0, 1, 127, 128, 255, random.integers(0, 256)])
    return bytes(changed)


@pytest.mark.parametrize("name", MUTABLE)
def test_flipped_bytes_decode_or_are_refused(name):
    kind, make = MUTABLE[name]
    content = make()
    random = np.random.default_rng(list(name.encode()))
    sampling = {"count": 3} if kind == "video" else {}
    decode(kind, content, **sampling)
    for _ in range(MUTATIONS):
        try:
            decode(kind, mutated(content, random), where="rows.csv:7", **sampling)
        except MediaError as error:
            assert str(error).startswith("rows.csv:7: ")
