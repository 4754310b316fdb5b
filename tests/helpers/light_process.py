"""The command line in forks of a process that has imported no more than a mistake in a recipe needs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recipe_texts import GOOD

SLOW = {"torch", "transformers", "trl", "peft", "datasets", "pandas", "sklearn", "scipy", "optuna", "numpy", "PIL"}
SERVER = f"""
import contextlib, gc, json, os, sys
from finetune.commands import cli
with contextlib.suppress(SystemExit):
    cli.main()
gc.freeze()
for line in sys.stdin:
    child = os.fork()
    if not child:
        folder, sys.argv, *files = json.loads(line)
        os.chdir(folder)
        for number, path in enumerate(files, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        try:
            cli.main()
        finally:
            print(*sorted({SLOW} & sys.modules.keys()))
    _, status, used = os.wait4(child, 0)
    print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, flush=True)
"""


@dataclass(frozen=True)
class Done:
    """`stdout` ends with the names of slow modules that were imported. `seconds`: of CPU, without the start of Python,
    which takes about half a second.
    """

    returncode: int
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True)
class LightProcess:
    process: "subprocess.Popen[bytes]"
    files: tuple[Path, Path]

    def run(self, *arguments: str) -> Done:
        """`finetune ARGUMENTS` in the current folder."""
        line = json.dumps([os.getcwd(), ["finetune", *arguments], *map(str, self.files)])
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        status, seconds = self.process.stdout.readline().split()
        return Done(int(status), *(path.read_text(encoding="utf-8") for path in self.files), seconds=float(seconds))


@contextmanager
def light_process(folder: Path) -> Iterator[LightProcess]:
    """A process that has checked a recipe, and is forked for each command. `folder`: for its files."""
    recipe = folder / "x.yaml"
    recipe.write_text(GOOD.replace("quantize: nf4", "quantize: nf5"))
    command, pipe = [sys.executable, "-c", SERVER, "check", str(recipe)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        yield LightProcess(process, (folder / "stdout", folder / "stderr"))
        assert process.stdin
        process.stdin.close()
