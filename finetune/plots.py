"""Plots as PNG: losses of the stages, scores of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = {"tuned": "#1b6ca8", "base": "#9a9a9a", "blank": "#c9b458", "shuffled": "#c07f4f", "probe": "#5a9367"}
SPARE = ("#8a6fb0", "#b0708a", "#6fa8a8")  # of further conditions


def losses(stages: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Loss per optimizer step, stage after stage, with its running mean over a tenth of the stage."""
    import numpy as np

    figure, (axes,) = _figure(7.5, 3.6)
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
    """`table` is metrics.json's `scores`: a panel a task, in it a group of bars a metric, one bar a condition."""
    from matplotlib.patches import Patch

    rows = [values for metrics in table.values() for values in metrics.values()]
    seen = dict.fromkeys(name for values in rows for name, value in values.items() if value is not None)
    colours = {name: COLOURS.get(name, SPARE[i % len(SPARE)]) for i, name in enumerate(seen)}
    most = max(len(metrics) for metrics in table.values())
    figure, panels = _figure(max(4.5, 2.1 * most), 0.4 + 3.0 * len(table), len(table))
    for axes, (task, metrics) in zip(panels, table.items(), strict=True):
        there = [name for name in colours if any(values.get(name) is not None for values in metrics.values())]
        width = 0.84 / len(there)
        for place, values in enumerate(metrics.values()):
            for number, condition in enumerate(there):
                value = values.get(condition)
                if value is None:
                    continue
                x = place + (number - (len(there) - 1) / 2) * width
                axes.bar(x, min(value, 1.0), width * 0.92, color=colours[condition])
                axes.text(x, min(value, 1.0) + 0.01, f"{value:.2f}", ha="center", fontsize=6.5)
        named = [metric.replace("_error_rate", " error rate\n(less is better)") for metric in metrics]
        axes.set_xticks(range(len(metrics)), named)
        axes.set_xlim(-0.6, most - 0.4)
        axes.set_ylim(0, 1.08)
        if len(table) > 1:
            axes.set_title(task, loc="left", fontsize=10)
    keys = [Patch(color=colour, label=name.replace("_", " ")) for name, colour in colours.items()]
    figure.legend(handles=keys, frameon=False, fontsize=8, ncols=min(len(keys), 2 * most), loc="outside upper center")
    _save(figure, path)


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    """Panels one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    found = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, found


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
