"""From the runs to ratios, and their table."""

import platform
import statistics
import sys
from datetime import date
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.train_vs_trl.measure import needed_flops
from benchmarks.train_vs_trl.options import Options

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")

Run = dict[str, Any]


def compared(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Of each kind of peer, by kind: `ratio`, samples a second of ours by those of the peer, and `cpu_ratio`, of CPU
    seconds, means over rounds; `spread`, the least and the greatest ratio of a round; `memory_ratio`, of the peak
    memory above the loaded weights. Where the peer's steps hold the samples of ours: `loss_difference`, mean and
    greatest relative difference of a step's losses.
    """
    found: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(run["kind"] for run in runs if run["kind"].startswith("peer")):
        pairs = [(peer, ours_beside(peer, runs)) for peer in runs if peer["kind"] == kind]
        ratios = [peer["seconds"] / ours["seconds"] for peer, ours in pairs]
        found[kind] = {
            "ratio": statistics.mean(ratios),
            "spread": [min(ratios), max(ratios)],
            "cpu_ratio": statistics.mean(peer["cpu_seconds"] / ours["cpu_seconds"] for peer, ours in pairs),
            "memory_ratio": statistics.mean(ours["memory"]["above"] / peer["memory"]["above"] for peer, ours in pairs),
        }
        if "steps" in kind:
            apart = [abs(one - other) / abs(one) for peer, ours in pairs for one, other in losses_of(peer, ours)]
            found[kind]["loss_difference"] = [statistics.mean(apart), max(apart)]
    return found


def losses_of(peer: Run, ours: Run) -> list[tuple[float, float]]:
    return list(zip(peer["losses"], ours["losses"], strict=True))


def ours_beside(peer: Run, runs: list[Run]) -> Run:
    """Our run of the same round, checkpointed where no other is."""
    return next(run for run in runs if run["kind"].startswith("ours") and run["round"] == peer["round"])


def summary(comparison: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures beside the usual peer, with the losses beside the one that takes the same steps."""
    kind = "peer" if "peer" in comparison else next(iter(comparison))
    same = next((one["loss_difference"] for one in comparison.values() if "loss_difference" in one), None)
    return {"peer": kind, **comparison[kind], "loss_difference": same}


def show(options: Options, facts: dict[str, Any], runs: list[Run], comparison: dict[str, dict[str, Any]]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    low, mean, high = facts["lengths"]
    asked = f", {options.questions} questions a picture" if options.workload == "questions" else ""
    asked += f", {options.pixels} pixels" if options.pixels else ""
    console.print(f"{options.workload}{asked}: {machine(options, facts)}", soft_wrap=True)
    console.print(
        f"{facts['samples']:,} samples, {facts['pictures']:,} pictures, {options.epochs} epochs, {facts['steps']:,} "
        f"steps of {facts['samples'] / facts['steps']:.1f}; {low} to {high} tokens a sample, mean {mean:.0f}; the LLM "
        f"reads {facts['peer']['tokens']:,} tokens of the peer's rows, {facts['ours']['tokens']:,} of ours "
        f"({facts['row_kind']})",
        soft_wrap=True,
    )
    peak = max(run["matmul_peak"] for run in runs)
    table = Table("run", *(name for name in COLUMNS), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for kind in dict.fromkeys(run["kind"] for run in runs):
        own = [run for run in runs if run["kind"] == kind]
        seconds = statistics.mean(run["seconds"] for run in own)
        flops = needed_flops(facts, "ours" if kind.startswith("ours") else "peer")
        one = comparison.get(kind, {})
        table.add_row(
            kind,
            str(len(own)),
            f"{facts['samples'] / seconds:.2f}",
            f"{1000 * statistics.mean(run['step_seconds'] for run in own):,.0f}",
            f"{statistics.mean(run['memory']['above'] for run in own) / 2**20:,.0f}",
            "" if "turns" in kind else f"{flops / seconds / peak:.0%}",
            f"{one['ratio']:.2f}" if one else "",
            f"{one['spread'][0]:.2f}..{one['spread'][1]:.2f}" if one else "",
            f"{one['cpu_ratio']:.2f}" if one else "",
            f"{one['memory_ratio']:.2f}" if one else "",
        )
    console.print(table)
    prepared = statistics.mean(run["prepared_in"] for run in runs if run["kind"].startswith("ours"))
    console.print(f"peak: {peak / 1e9:,.0f} GFLOP/s; ours prepares in {prepared:.1f} s, which count")
    for peer in runs:
        if "steps" in peer["kind"]:
            show_losses(console, losses_of(peer, ours_beside(peer, runs)), comparison[peer["kind"]]["loss_difference"])


COLUMNS = ("n", "samples/s", "step ms", "above MiB", "of peak", "ratio", "spread", "CPU", "memory")


def show_losses(console: Console, losses: list[tuple[float, float]], apart: list[float]) -> None:
    """Every so many steps, some eight in all."""
    every = max(1, len(losses) // 8)
    shown = [f"{step + 1}: {one:.4f} {other:.4f}" for step, (one, other) in enumerate(losses) if step % every == 0]
    console.print(f"losses of peer-steps and ours by step: {'; '.join(shown)}", soft_wrap=True)
    console.print(f"relative difference a step: mean {apart[0]:.4%}, greatest {apart[1]:.4%}")


def machine(options: Options, facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{date.today()}, {facts['device']}, {options.threads} threads, Python {platform.python_version()}, {versions}"
    )
