"""Whatever a file holds: a medium, or a MediaError that names it, soon and in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fuzzed_media
import hostile_files
import pytest

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


SPOILT = 40  # files of each format; `test_fuzzed_media.py` tries more


@pytest.mark.parametrize("name", fuzzed_media.FORMATS)
def test_spoilt_files_decode_or_are_refused(name):
    assert fuzzed_media.fault_of(fuzzed_media.FORMATS[name][0], fuzzed_media.whole(name)) == ""
    outcome = fuzzed_media.outcome_of(name, 0, SPOILT)
    assert not outcome.wrong and not outcome.slow and outcome.decoded + outcome.refused == SPOILT, outcome
