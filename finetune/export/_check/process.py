"""Questions to an exported folder, in a clean process (`_ask.py`)."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.common.errors import ExportRefused
from finetune.common.run_folder import read_json, write_json
from finetune.export._contract import Answered


def asked_in_process(folder: Path, questions: dict[str, Any], modules: Sequence[str] = ()) -> Answered:
    """`modules` of this package are imported there. Raises ExportRefused with the last line said, if it fails."""
    with tempfile.TemporaryDirectory() as place:
        asked, answers = Path(place) / "questions.json", Path(place) / "answers.json"
        write_json(asked, questions)
        # -P: a folder of programs is no place to import from: one here is called transformers.
        command = [sys.executable, "-P", str(Path(__file__).with_name("ask.py")), str(folder.absolute())]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            [*command, str(asked), str(answers), *modules], capture_output=True, text=True, env=environment, cwd=place
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
            raise ExportRefused(f"what was written can't be asked in a process of its own: {said[-1].strip()[:300]}")
        found = read_json(answers)
    return Answered(found["engine"], tuple(tuple(one) for one in found["answers"]))
