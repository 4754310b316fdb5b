"""Plots, as PNG: losses and validation scores over the steps, scores of a run, calibration, a sweep's trials."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data.metrics import lower_is_better
from finetune.evaluation.report import words
from finetune.evaluation.results import StageResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"tuned": "#1b6ca8", "base": "#9a9a9a", "blank": "#c9b458", "shuffled": "#c07f4f", "probe": "#5a9367"}
SPARE = ("#8a6fb0", "#b0708a", "#6fa8a8")  # of further conditions
INK, LINE, MUTED, ACCENT = "#000000", "#e5e5e5", "#888888", COLOURS["tuned"]
POINTS = 1500  # drawn of a stage's steps
CURVES = (ACCENT, *SPARE, COLOURS["shuffled"], COLOURS["probe"])
DPI = 150


def losses(stages: Mapping[str, Sequence[float]], path: Path) -> None:
    """Stage -> loss of each optimizer step, stage after stage, with its running mean over a tenth of the stage."""
    _save(losses_figure(stages), path)


def losses_figure(stages: Mapping[str, Sequence[float]], width: float = 7.5, height: float = 3.6) -> "Figure":
    """What `losses` draws; the size is in inches."""
    import numpy as np

    figure, (axes,) = _figure(width, height)
    begin, highest = 0, 0.0
    for number, (name, stage) in enumerate(stages.items()):
        values = np.array(stage, dtype=float)
        if not len(values):
            continue
        steps = begin + 1 + np.arange(len(values))
        window = max(1, len(values) // 10)
        mean = np.convolve(np.pad(values, (window - 1, 0), mode="edge"), np.ones(window) / window, mode="valid")
        thin = slice(None, None, -(-len(values) // POINTS))
        axes.plot(steps[thin], values[thin], color=ACCENT, alpha=0.25, linewidth=0.8)
        axes.plot(steps[thin], mean[thin], color=ACCENT, linewidth=1.8)
        _begin_stage(axes, name, begin, len(values), first=not number)
        highest = max(highest, float(np.nanpercentile(values, 99)))
        begin += len(values)
    axes.set_xlim(0, begin + 1)
    axes.set_ylim(0, highest * 1.1 or 1.0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per answer token)")
    return figure


def validation_figure(
    stages: Mapping[str, StageResult], task: str, width: float = 7.5, height: float = 3.6
) -> "Figure | None":
    """A task's metrics on validation rows over the optimizer steps of all stages, with a line at each stage's best
    step; None if nothing was measured. The size is in inches.
    """
    curves: dict[str, list[list[tuple[int, float]]]] = {}  # metric -> points, stage by stage
    figure, (axes,) = _figure(width, height)
    begin, best_steps = 0, []
    for number, (name, stage) in enumerate(stages.items()):
        points: dict[str, list[tuple[int, float]]] = {}
        for measured in stage.validation:
            for metric, value in measured.scores.get(task, {}).items():
                if value is not None:
                    points.setdefault(metric, []).append((begin + measured.step, value))
        for metric, curve in points.items():
            curves.setdefault(metric, []).append(curve)
        if points and stage.best_step is not None:
            best_steps.append(begin + stage.best_step)
        _begin_stage(axes, name, begin, stage.steps, first=not number)
        begin += stage.steps
    if not curves:
        return None
    for number, (metric, pieces) in enumerate(curves.items()):
        for piece_number, piece in enumerate(pieces):
            label = words.plain(metric) if not piece_number else None
            colour, line = CURVES[number % len(CURVES)], "-" if number < len(CURVES) else ":"
            axes.plot(*zip(*piece, strict=True), line, marker="o", markersize=3.5, color=colour, label=label)
    for number, step in enumerate(best_steps):
        axes.axvline(step, color=INK, linewidth=1, linestyle="--", label=None if number else "best step, kept")
    axes.set_xlim(0, begin * 1.02 + 1)
    lowest = min(value for pieces in curves.values() for piece in pieces for _, value in piece)
    axes.set_ylim(bottom=min(0, 1.05 * lowest))
    axes.set_xlabel("optimizer step")
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    return figure


def scores(table: Mapping[str, Mapping[str, Mapping[str, float | None]]], path: Path) -> None:
    """`table` is metrics.json's `scores`: a panel per task, in it a group of bars per metric, one bar per condition."""
    from matplotlib.patches import Patch

    rows = [values for metrics in table.values() for values in metrics.values()]
    conditions = dict.fromkeys(name for values in rows for name, value in values.items() if value is not None)
    colours = {name: COLOURS.get(name, SPARE[i % len(SPARE)]) for i, name in enumerate(conditions)}
    most = max(len(metrics) for metrics in table.values())
    figure, panels = _figure(max(4.5, 2.1 * most), 0.4 + 3.0 * len(table), len(table))
    for axes, (task, metrics) in zip(panels, table.items(), strict=True):
        drawn = [name for name in colours if any(values.get(name) is not None for values in metrics.values())]
        width = 0.84 / len(drawn)
        for place, values in enumerate(metrics.values()):
            for number, condition in enumerate(drawn):
                value = values.get(condition)
                if value is None:
                    continue
                x = place + (number - (len(drawn) - 1) / 2) * width
                axes.bar(x, min(value, 1.0), width * 0.92, color=colours[condition])
                axes.text(x, min(value, 1.0) + 0.01, f"{value:.2f}", ha="center", fontsize=6.5)
        names = [words.plain(name) + "\n(lower is better)" * lower_is_better(name) for name in metrics]
        axes.set_xticks(range(len(metrics)), names)
        axes.set_xlim(-0.6, most - 0.4)
        axes.set_ylim(0, 1.08)
        if len(table) > 1:
            axes.set_title(task, loc="left", fontsize=10)
    keys = [Patch(color=colour, label=words.condition(name)) for name, colour in colours.items()]
    figure.legend(handles=keys, frameon=False, fontsize=8, ncols=min(len(keys), 2 * most), loc="outside upper center")
    _save(figure, path)


def calibration_figure(bins: Sequence[tuple[float, float, int]]) -> "Figure":
    """`bins`: (mean confidence, accuracy, rows) of answers of similar confidence. The dotted line is perfect
    calibration.
    """
    figure, (axes,) = _figure(4.5, 3.6)
    most = max(count for _, _, count in bins)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=":")
    confidence, accuracy, counts = zip(*bins, strict=True)
    axes.plot(confidence, accuracy, color=ACCENT, linewidth=1)
    axes.scatter(confidence, accuracy, [20 + 140 * count / most for count in counts], color=ACCENT)
    axes.set_xlim(0, 1.04)
    axes.set_ylim(0, 1.04)
    axes.set_xlabel("confidence (mean probability)")
    axes.set_ylabel("accuracy")
    return figure


def sweep(trials: Sequence[tuple[Mapping[str, object], float]], metric: str, path: Path) -> None:
    """`trials`: (key of the recipe -> its value, selection score) of complete ones. A panel per key, with the metric
    over its values and the best trial ringed.
    """
    keys = list(trials[0][0])
    figure, panels = _figure(6.0, 2.6 * len(keys), len(keys))
    results = [score for _, score in trials]
    best = results.index(max(results))
    if lower_is_better(metric):  # errors are selected by their negative
        results = [-score for score in results]
    for axes, key in zip(panels, keys, strict=True):
        values = [chosen[key] for chosen, _ in trials]
        numbers = [number for value in values if (number := _number(value)) is not None]
        numeric = len(numbers) == len(values)
        names = sorted({str(value) for value in values})
        places = numbers if numeric else [float(names.index(str(value))) for value in values]
        axes.scatter(places, results, color=ACCENT, alpha=0.7, s=28)
        axes.scatter(places[best], results[best], s=110, facecolors="none", edgecolors=COLOURS["shuffled"])
        if not numeric:
            axes.set_xticks(range(len(names)), names)
        elif min(numbers) > 0 and max(numbers) >= 10 * min(numbers):
            axes.set_xscale("log")
        axes.set_xlabel(key)
        axes.set_ylabel(f"{words.plain(metric)}\n(lower is better)" if lower_is_better(metric) else words.plain(metric))
    _save(figure, path)


def _number(value: object) -> float | None:
    try:
        return float(str(value))
    except ValueError:
        return None


def png(figure: "Figure") -> bytes:
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)  # a name with dollar signs is no formula
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure))


def _begin_stage(axes: "Axes", name: str, begin: int, steps: int, first: bool) -> None:
    """The stage's name above its steps, and a line where it begins."""
    if not first:
        axes.axvline(begin + 0.5, color=MUTED, linewidth=0.8, linestyle=":")
    axes.text(begin + steps / 2, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=9)


def _figure(width: float, height: float, panels: int = 1) -> "tuple[Figure, list[Axes]]":
    """Panels one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    all_axes: list[Axes] = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, all_axes
