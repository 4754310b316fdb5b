"""Plots as PNG: losses of the stages, scores of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = {"tuned": "#1b6ca8", "base": "#9a9a9a", "blank": "#c9b458", "shuffled": "#c07f4f", "probe": "#5a9367"}
SPARE = ("#8a6fb0", "#b0708a", "#6fa8a8")  # of further conditions


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


def scores(table: Mapping[str, Any], path: Path) -> None:
    """`table` is metrics.json's `scores`: a group of bars for each task's metric, one bar a condition."""
    from matplotlib.patches import Patch

    groups = [(task, metric, values) for task, metrics in table.items() for metric, values in metrics.items()]
    figure, axes = _figure(max(4.5, 1.9 * len(groups)), 3.6)
    seen = dict.fromkeys(name for _, _, values in groups for name, value in values.items() if value is not None)
    conditions = {name: COLOURS.get(name, SPARE[i % len(SPARE)]) for i, name in enumerate(seen)}
    width = 0.84 / len(conditions)
    for place, (_, _, values) in enumerate(groups):
        for number, (condition, colour) in enumerate(conditions.items()):
            value = values.get(condition)
            if value is None:
                continue
            x = place + (number - (len(conditions) - 1) / 2) * width
            axes.bar(x, min(value, 1.0), width * 0.92, color=colour)
            axes.text(x, min(value, 1.0) + 0.01, f"{value:.2f}", ha="center", fontsize=7)
    several = len(table) > 1
    named = [metric.replace("_error_rate", " error rate\n(less is better)") for _, metric, _ in groups]
    axes.set_xticks(
        range(len(groups)),
        [f"{task}\n{name}" if several else name for (task, _, _), name in zip(groups, named, strict=True)],
    )
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(0, 1.05)
    keys = [Patch(color=colour, label=name.replace("_", " ")) for name, colour in conditions.items()]
    axes.legend(
        handles=keys, frameon=False, fontsize=8, ncols=len(keys), loc="upper center", bbox_to_anchor=(0.5, 1.13)
    )
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
