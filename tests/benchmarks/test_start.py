"""The benchmark of a run's start, at toy size: the second start finds what the first has kept, and learns the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def test_a_second_start_reads_and_encodes_nothing_anew(tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/start.py", "--rows", "1500", "--kinds", "picture", "--pictures", "300"]
    done = subprocess.run([*command, "--again", "1", "--json", str(file)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(file.read_text())
    assert [first["start"], second["start"]] == ["first", "second"] and first["loss"] == second["loss"]
    for phase in ("read", "encode", "tokenize"):
        assert second["phases"][phase] < first["phases"][phase], phase
    assert first["memory"]["peak"] >= first["memory"]["resident"] >= first["memory"]["own"] > 0
    assert len(done.stdout.splitlines()) == 3
