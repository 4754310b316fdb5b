"""Runs steps one after the other, each in a process of its own, or of its kind. The next one already imports what it
needs, and waits: else imports would take as long as checks.
"""

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic, sleep
from typing import Literal

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import Step
from benchmarks.train_vs_trl.workload import ROOT

PATIENCE = 4  # times what a step usually takes; then it is stopped
POLL = 0.05  # seconds
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


class Worker:
    """A process for the steps that share it. It imports what the first one needs, and begins with each when `finish`
    writes its name.
    """

    def __init__(self, step: Step, setting: Setting, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.first, self.folder = step, setting.folder
        self.log = outcome_of(setting.folder, step.name).with_suffix(".log")
        with self.log.open("w", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                [*command, step.name, str(setting.folder)],
                cwd=ROOT,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def finish(self, step: Step, most_seconds: float) -> Outcome:
        """Let it do a step, and wait; it is killed where it takes longer."""
        begin = monotonic()
        found = outcome_of(self.folder, step.name)
        try:
            self._begin(step)
            while not found.is_file():
                if (status := self.process.poll()) is not None and not found.is_file():
                    return Outcome(step.name, "fail", f"its process ended with {status}", monotonic() - begin)
                if monotonic() - begin > most_seconds:
                    self.stop()
                    return Outcome(step.name, "fail", "stopped: it took too long", monotonic() - begin)
                sleep(POLL)
        except BaseException:  # the command itself is being stopped
            self.stop()
            raise
        outcome = Outcome(**json.loads(found.read_text(encoding="utf-8")))
        return replace(outcome, seconds=monotonic() - begin)

    def _begin(self, step: Step) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it has ended, which is found below
            self.process.stdin.write(f"{step.name}\n")
            self.process.stdin.flush()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

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
    working: Worker | None = None
    waiting: Worker | None = None
    try:
        for number, step in enumerate(steps):
            if working and not working.first.shares_process(step):
                working.stop()
                working = None
            left = seconds - (monotonic() - begin)
            if reason := why_skipped(step, known, passed, left):
                yield Outcome(step.name, "skip", reason)
                continue
            if waiting and not working and waiting.first.shares_process(step):
                working, waiting = waiting, None
            if waiting and not any(waiting.first.shares_process(one) for one in steps[number:]):  # none was to run
                waiting.stop()
                waiting = None
            working = working or Worker(step, setting, command, environment)
            following = next((one for one in steps[number + 1 :] if not step.shares_process(one)), None)
            if following and not waiting and not step.alone:
                waiting = Worker(following, setting, command, environment)
            outcome = working.finish(step, min(left, PATIENCE * step.seconds if setting.device == "cuda" else left))
            passed |= {step.name} if outcome.result == "pass" else set()
            yield outcome
            if outcome.result == "fail":  # what it left in memory isn't for others
                print(working.last_lines(), file=sys.stderr, flush=True)
                working.stop()
                working = None
    finally:
        for worker in (working, waiting):
            if worker:
                worker.stop()


def why_skipped(step: Step, known: Collection[str], passed: Collection[str], left: float) -> str:
    """`known`: all steps that are to run; `left`: seconds. '' where it runs."""
    missing = [name for name in step.needs if name in known and name not in passed]
    if missing:
        return f"needs {missing[0]}"
    return f"no time: {left:.0f} s are left, it takes {step.seconds}" if left < step.seconds else ""


def environment_for(setting: Setting) -> dict[str, str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if setting.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def outcome_of(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '-')}.outcome.json"


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Where a `Worker` finds it, whole."""
    path = outcome_of(folder, outcome.name)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    unfinished.replace(path)
