"""Runs `ask.py`, which loads an exported folder and answers questions, in a process of its own."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from finetune.common.errors import ExportRefused
from finetune.common.run_folder import read_json, write_json
from finetune.export._check.ask import QuestionFile
from finetune.export._contract import EngineAnswers

RAISED = re.compile(r"^[\w.]+(Error|Exception): ", re.MULTILINE)  # the line below a traceback


def answers_of_process(folder: Path, questions: QuestionFile, modules: Sequence[str] = ()) -> EngineAnswers:
    """`modules` of this package are imported there. Raises ExportRefused with the process's error if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        questions_file, answers_file = Path(scratch) / "questions.json", Path(scratch) / "answers.json"
        write_json(questions_file, questions)
        # -P: without it the script's folder is searched for modules before the libraries.
        command = [sys.executable, "-P", str(Path(__file__).with_name("ask.py")), str(folder.absolute())]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.run(
            [*command, str(questions_file), str(answers_file), *modules],
            capture_output=True,
            text=True,
            env=environment,
            cwd=scratch,
        )
        if process.returncode:
            raise ExportRefused(f"the export fails in a process of its own: {last_error(process)}")
        content = read_json(answers_file)
    return EngineAnswers(content["engine"], tuple(map(tuple, content["answers"])))


def last_line(process: "subprocess.CompletedProcess[str]") -> str:
    """The last line that a failed process wrote, or its exit status."""
    lines = (process.stderr.strip() or process.stdout.strip()).splitlines()
    return lines[-1].strip()[:300] if lines else f"exit status {process.returncode}"


def last_error(process: "subprocess.CompletedProcess[str]") -> str:
    """What a failed Python process raised, which may be several lines, or its last line."""
    found = [*RAISED.finditer(process.stderr)]
    return " ".join(process.stderr[found[-1].start() :].split())[:300] if found else last_line(process)
