"""Plots as PNG: losses of the stages, scores of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = {"tuned": "#1b6ca8", "base": "#9a9a9a", "blank": "#c9b458", "shuffled": "#c07f4f", "probe": "#5a9367"}


def losses(stages: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Loss per optimizer step, stage after stage, with its running mean over a tenth of the stage."""
    import numpy as np

    figure, axes = _figure(7.5, 3.6)
    begin, highest = 0, 0.0
    for number, (name, stage) in enumerate(stages.items()):
        values = np.array(stage["losses"], dtype=float)
        if not len(values):
            continue
        steps = begin + 1 + np.arange(len(values))
        window = max(1, len(values) // 10)
        mean = np.convolve(np.pad(values, (window - 1, 0), mode="edge"), np.ones(window) / window, mode="valid")
        axes.plot(steps, values, color="#1b6ca8", alpha=0.25, linewidth=0.8)
        axes.plot(steps, mean, color="#1b6ca8", linewidth=1.8)
        if number:
            axes.axvline(begin + 0.5, color="#888888", linewidth=0.8, linestyle=":")
        highest = max(highest, float(np.percentile(values, 99)))
        axes.text(begin + len(values) / 2, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=9)
        begin += len(values)
    axes.set_xlim(0, begin + 1)
    axes.set_ylim(0, highest * 1.1 or 1.0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per answer token)")
    _save(figure, path)


def scores(
    table: Mapping[str, Mapping[str, Mapping[str, float | None]]], primary: Mapping[str, str], path: Path
) -> None:
    """`table` is metrics.json's `scores`. One group of bars a task: its primary metric under each condition."""
    figure, axes = _figure(7.5, 3.6)
    width = 0.8 / len(COLOURS)
    for place, (task, metrics) in enumerate(table.items()):
        values = metrics[primary[task]]
        for number, (kind, colour) in enumerate(COLOURS.items()):
            value = values.get(kind)
            if value is None:
                continue
            x = place + (number - (len(COLOURS) - 1) / 2) * width
            axes.bar(x, value, width * 0.92, color=colour, label=kind if not place else None)
            axes.text(x, value + 0.01, f"{value:.2f}", ha="center", fontsize=8)
    axes.set_xticks(range(len(table)), [f"{task} ({primary[task]})" for task in table])
    axes.set_xlim(-0.7, len(table) - 0.3)
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False, fontsize=8, ncols=len(COLOURS), loc="upper center", bbox_to_anchor=(0.5, 1.13))
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
