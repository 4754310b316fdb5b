"""The command line in this process: what a shell would see, without the seconds that a start of Python takes."""

import contextlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from finetune.commands.cli import main

REAL = (sys.executable, "-m", "finetune.commands.cli")  # the same in a process of its own


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


def cli(*arguments: object, cwd: Path | None = None) -> Result:
    """`finetune ARGUMENTS`. An exception that a user would see as a traceback is raised here."""
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        contextlib.chdir(cwd or Path.cwd()),
        patch.object(sys, "argv", ["finetune", *map(str, arguments)]),
    ):
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Result(status, stdout.getvalue(), stderr.getvalue())


def in_this_process(command: Sequence[str], **options: object) -> Result:
    """To stand for `subprocess.run` where the product starts its own command line."""
    assert tuple(command[:3]) == REAL, command
    return cli(*command[3:])
