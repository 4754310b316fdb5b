"""Runs steps one after the other, each in a process of its own. The next one already imports what it needs, and waits:
else imports would take as long as checks.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Literal

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import Step
from benchmarks.train_vs_trl.workload import ROOT

PATIENCE = 4  # times what a step usually takes; then it is stopped
LINES = 15  # of the output of what failed


@dataclass(frozen=True)
class Outcome:
    """`detail`: figures, or why a step failed or was skipped."""

    name: str
    result: Literal["pass", "fail", "skip"]
    detail: str
    seconds: float = 0.0

    def line(self) -> str:
        return f"{self.result}  {self.name:20} {self.seconds:6.1f} s  {self.detail}"


class Waiting:
    """The process of a step, which begins when `finish` tells it to."""

    def __init__(self, step: Step, setting: Setting, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.step = step
        self.found = setting.folder / f"{step.name.replace(' ', '-')}.outcome.json"
        self.log = self.found.with_suffix(".log")
        with self.log.open("w", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                [*command, step.name, str(setting.folder)],
                cwd=ROOT,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def finish(self, most_seconds: float) -> Outcome:
        """Let it begin, and wait; it is killed where it takes longer."""
        begin = monotonic()
        try:
            self.process.communicate(b"begin\n", timeout=most_seconds)
        except subprocess.TimeoutExpired:
            self.stop()
            return Outcome(self.step.name, "fail", "stopped: it took too long", monotonic() - begin)
        except BaseException:  # the command itself is being stopped
            self.stop()
            raise
        seconds = monotonic() - begin
        if not self.found.is_file():
            return Outcome(self.step.name, "fail", f"its process ended with {self.process.returncode}", seconds)
        outcome = Outcome(**json.loads(self.found.read_text(encoding="utf-8")))
        return Outcome(outcome.name, outcome.result, outcome.detail, seconds)

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def last_lines(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES:])


def run_all(
    setting: Setting,
    steps: Sequence[Step],
    seconds: float,
    command: Sequence[str] = (sys.executable, "-m", "benchmarks.gpu", "--process"),
) -> Iterator[Outcome]:
    """The outcome of each step as soon as it ends. What failed shows its last lines on stderr."""
    begin, passed, known = monotonic(), set(), {step.name for step in steps}
    environment = environment_for(setting)
    waiting: Waiting | None = None
    try:
        for number, step in enumerate(steps):
            mine = waiting if waiting and waiting.step is step else None
            waiting = None if mine else waiting
            left = seconds - (monotonic() - begin)
            missing = [name for name in step.needs if name in known and name not in passed]
            if missing or left < step.seconds:
                if mine:
                    mine.stop()
                reason = (
                    f"needs {missing[0]}" if missing else f"no time: {left:.0f} s are left, it takes {step.seconds}"
                )
                yield Outcome(step.name, "skip", reason)
                continue
            mine = mine or Waiting(step, setting, command, environment)
            if number + 1 < len(steps) and not step.alone:
                waiting = Waiting(steps[number + 1], setting, command, environment)
            outcome = mine.finish(min(left, PATIENCE * step.seconds if setting.device == "cuda" else left))
            passed |= {step.name} if outcome.result == "pass" else set()
            yield outcome
            if outcome.result == "fail":
                print(mine.last_lines(), file=sys.stderr, flush=True)
    finally:
        if waiting:
            waiting.stop()


def environment_for(setting: Setting) -> dict[str, str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if setting.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Where `Waiting` finds it."""
    path = folder / f"{outcome.name.replace(' ', '-')}.outcome.json"
    path.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
