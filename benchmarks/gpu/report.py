"""The outcomes as a section of benchmarks/RESULTS.md."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from benchmarks.gpu.run import Outcome
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import STEPS
from benchmarks.train_vs_trl.workload import ROOT

RESULTS = ROOT / "benchmarks/RESULTS.md"


@dataclass(frozen=True)
class Goal:
    """By questions a picture: how many times trl's samples a second, and at most which share of its peak memory."""

    speed: float
    memory: float | None = None


GOALS = {1: Goal(2.0, 0.6), 5: Goal(4.0)}


@dataclass(frozen=True)
class Timed:
    """A run of the comparison. `samples`: a second, all that belongs to the run counted; `in_steps`: seconds that a
    sample takes in the median step; memory in bytes.
    """

    questions: int
    kind: str
    samples: float
    in_steps: float
    peak: int
    above: int


def report(setting: Setting, outcomes: Sequence[Outcome]) -> str:
    """Markdown: a heading with card and date, a table of the checks and one of the timed trainings."""
    machine = next((one.detail for one in outcomes if one.name == "machine"), "")
    card = machine.partition(";")[0] or setting.device
    command = "python -m benchmarks.gpu" + (f" --device {setting.device}" if setting.device != "cuda" else "")
    command += " --toy" if setting.toy else ""
    lines = [f"## On a GPU: {card}, {date.today()}", "", f"`{command}`", "", machine, ""]
    if setting.toy:
        lines += ["Everything at toy size: its figures tell nothing.", ""]
    lines += ["| check | result | seconds | found |", "|---|---|---:|---|"]
    lines += [
        f"| {o.name} | {o.result} | {o.seconds:.1f} | {cell(o.detail)} |" for o in outcomes if o.name != "machine"
    ]
    passed = {one.name for one in outcomes if one.result == "pass"}
    runs = [timed for step in STEPS if step.name in passed and (timed := timed_run(setting, step.timed))]
    if runs:
        lines += ["", *compared(runs), "", *map(judged, GOALS, [runs] * len(GOALS))]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def timed_run(setting: Setting, timed: tuple[int, str] | None) -> Timed | None:
    if timed is None:
        return None
    questions, kind = timed
    folder = setting.folder / f"questions-{questions}"
    found: dict[str, Any] = json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))
    samples = json.loads((folder / "prepare.json").read_text(encoding="utf-8"))["samples"]
    memory = found["memory"]
    in_steps = found["step_seconds"] / found["step_samples"]
    return Timed(questions, kind, samples / found["seconds"], in_steps, memory["process"], memory["above"])


def compared(runs: Sequence[Timed]) -> list[str]:
    """A table; ratios are those of plain ours to the run, of memory and of memory above the weights."""
    lines = [
        "| questions a picture | run | samples/s | ms a sample in steps | peak, GiB | above the weights, GiB "
        "| ours as fast | in steps | peak, ours by its | above the weights |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        ours = plain(runs, run.questions, "ours")
        ratios = [""] * 4
        if ours and run.kind != "ours":
            ratios = [
                f"{ours.samples / run.samples:.2f}",
                f"{run.in_steps / ours.in_steps:.2f}",
                f"{ours.peak / run.peak:.2f}",
                f"{ours.above / max(run.above, 1):.2f}",
            ]
        figures = [f"{run.samples:.2f}", f"{1000 * run.in_steps:,.1f}", gib(run.peak), gib(run.above), *ratios]
        lines.append(f"| {run.questions} | {run.kind.replace('peer', 'trl')} | {' | '.join(figures)} |")
    return lines


def plain(runs: Sequence[Timed], questions: int, kind: str) -> Timed | None:
    return next((run for run in runs if (run.questions, run.kind) == (questions, kind)), None)


def gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def judged(questions: int, runs: Sequence[Timed]) -> str:
    """Whether the goal was reached, in a sentence."""
    goal, ours, peer = GOALS[questions], plain(runs, questions, "ours"), plain(runs, questions, "peer")
    asked = f"{goal.speed:g} times trl" + (f", at most {goal.memory:.0%} of its peak" if goal.memory else "")
    if not ours or not peer:
        return f"- {questions} a picture, goal {asked}: not measured."
    speed, memory = ours.samples / peer.samples, ours.peak / peer.peak
    in_steps = peer.in_steps / ours.in_steps
    reached = speed >= goal.speed and (goal.memory is None or memory <= goal.memory)
    return (
        f"- {questions} a picture, goal {asked}: {'reached' if reached else 'not reached'} "
        f"({speed:.2f} times, {in_steps:.2f} in steps, {memory:.0%} of the peak)."
    )


def append(text: str) -> None:
    """To RESULTS.md."""
    with RESULTS.open("a", encoding="utf-8") as stream:
        stream.write(f"\n{text}")
