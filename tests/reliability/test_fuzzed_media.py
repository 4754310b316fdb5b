"""Media of every format spoilt at random: a medium within bounds or a message that names the row, soon and in little
memory; no other error, no hang, and no crash of a decoder.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import fuzzed_media
import pytest

import finetune

pytestmark = [pytest.mark.slow, pytest.mark.full]
COUNT = 2_000  # of each format


@pytest.mark.parametrize("name", fuzzed_media.FORMATS)
def test_spoilt_media_decode_or_are_refused(name, tmp_path, tried):
    environment = {**os.environ, "PYTHONPATH": str(Path(finetune.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    progress = tmp_path / "seed"
    command = [sys.executable, fuzzed_media.__file__, name, "0", str(COUNT), str(progress)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.returncode, f"at seed {progress.read_text()}", done.stderr[-2000:])
    outcome = fuzzed_media.Outcome(**json.loads(done.stdout))
    assert not outcome.wrong and not outcome.slow and not outcome.large, outcome
    assert outcome.decoded and outcome.decoded + outcome.refused == COUNT
    tried(f"{COUNT:,} spoilt files of {name}", f"{outcome.decoded:,} decoded, {outcome.refused:,} refused")
