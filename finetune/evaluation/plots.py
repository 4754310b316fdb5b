"""Plots: losses and validation scores over the steps, scores of a run, calibration. As PNG, or as SVG for a page."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"tuned": "#1b6ca8", "base": "#9a9a9a", "blank": "#c9b458", "shuffled": "#c07f4f", "probe": "#5a9367"}
SPARE = ("#8a6fb0", "#b0708a", "#6fa8a8")  # of further conditions
INK, LINE, MUTED, ACCENT = "#000000", "#e5e5e5", "#888888", COLOURS["tuned"]
# What a page's stylesheet sets for light and dark, in place of the colours of a PNG.
THEMED = {INK: "var(--ink)", LINE: "var(--line)", MUTED: "var(--muted)", ACCENT: "var(--accent)"}
POINTS = 1500  # drawn of a stage's steps
CURVES = (ACCENT, *SPARE, COLOURS["shuffled"], COLOURS["probe"])


def losses(stages: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Loss per optimizer step, stage after stage, with its running mean over a tenth of the stage."""
    _save(losses_figure(stages), path)


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


def losses_figure(stages: Mapping[str, Mapping[str, Any]], width: float = 7.5, height: float = 3.6) -> Any:
    """What `losses` draws, of a size in inches."""
    import numpy as np

    figure, (axes,) = _figure(width, height)
    begin, highest = 0, 0.0
    for number, (name, stage) in enumerate(stages.items()):
        values = np.array(stage["losses"], dtype=float)
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
    stages: Mapping[str, Mapping[str, Any]], task: str, width: float = 7.5, height: float = 3.6
) -> Any | None:
    """A task's metrics on validation rows over the optimizer steps of all stages, and the step that was kept where one
    was; None where nothing was measured. Sizes in inches.
    """
    curves: dict[str, list[list[tuple[int, float]]]] = {}  # of each metric a piece a stage
    figure, (axes,) = _figure(width, height)
    begin, kept = 0, []
    for number, (name, stage) in enumerate(stages.items()):
        pieces: dict[str, list[tuple[int, float]]] = {}
        for measured in stage.get("validation") or []:
            for metric, value in measured["scores"].get(task, {}).items():
                if value is not None:
                    pieces.setdefault(metric, []).append((begin + measured["step"], value))
        for metric, piece in pieces.items():
            curves.setdefault(metric, []).append(piece)
        if pieces and stage.get("best_step") is not None:
            kept.append(begin + stage["best_step"])
        _begin_stage(axes, name, begin, stage["steps"], first=not number)
        begin += stage["steps"]
    if not curves:
        return None
    for number, (metric, found) in enumerate(curves.items()):
        for piece_number, piece in enumerate(found):
            label = metric.replace("_", " ") if not piece_number else None
            axes.plot(
                *zip(*piece, strict=True), marker="o", markersize=3.5, color=CURVES[number % len(CURVES)], label=label
            )
    for number, step in enumerate(kept):
        axes.axvline(step, color=INK, linewidth=1, linestyle="--", label=None if number else "kept")
    axes.set_xlim(0, begin * 1.02 + 1)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.set_xlabel("optimizer step")
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    return figure


def calibration_figure(bins: Sequence[tuple[float, float, int]], width: float = 4.5, height: float = 3.6) -> Any:
    """`bins`: (mean confidence, share that is right, rows) of answers that are about equally sure. On the dotted line
    a model is as often right as it says. Sizes in inches.
    """
    figure, (axes,) = _figure(width, height)
    most = max(count for _, _, count in bins)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=":")
    confidence, right, counts = zip(*bins, strict=True)
    axes.plot(confidence, right, color=ACCENT, linewidth=1)
    axes.scatter(confidence, right, [20 + 140 * count / most for count in counts], color=ACCENT)
    axes.set_xlim(0, 1.04)
    axes.set_ylim(0, 1.04)
    axes.set_xlabel("how sure it is (mean probability)")
    axes.set_ylabel("how often it is right")
    return figure


def sweep(trials: Sequence[Mapping[str, Any]], path: Path) -> None:
    """`trials`: complete ones of sweep.json. A panel a key: the merit over its values, the best trial ringed."""
    keys = list(trials[0]["values"])
    figure, panels = _figure(6.0, 2.6 * len(keys), len(keys))
    best = max(trials, key=lambda trial: trial["merit"])
    for axes, key in zip(panels, keys, strict=True):
        values = [trial["values"][key] for trial in trials]
        numbers = [number for value in values if (number := _number(value)) is not None]
        numeric = len(numbers) == len(values)
        names = sorted({str(value) for value in values})
        places = numbers if numeric else [float(names.index(str(value))) for value in values]
        axes.scatter(places, [trial["merit"] for trial in trials], color="#1b6ca8", alpha=0.7, s=28)
        axes.scatter(places[trials.index(best)], best["merit"], s=110, facecolors="none", edgecolors="#c07f4f")
        if not numeric:
            axes.set_xticks(range(len(names)), names)
        elif min(numbers) > 0 and max(numbers) >= 10 * min(numbers):
            axes.set_xscale("log")
        axes.set_xlabel(key)
        axes.set_ylabel("merit")
    _save(figure, path)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def svg(figure: Any, name: str, label: str) -> str:
    """An <svg> element as wide as its place, in the page's own colours: --ink, --line, --muted and --accent. `name`
    begins its ids; `label` says what it shows to those who don't see it.
    """
    from html import escape

    import matplotlib

    _as_written(figure)
    file = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "finetune"}):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg ") :]
    head, _, rest = drawn.partition(">")
    view = re.search(r'viewBox="[\d. ]+"', head)
    rest = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", rest)
    for colour, variable in THEMED.items():
        rest = rest.replace(colour, variable)
    assert view
    return f'<svg {view[0]} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{escape(label)}">{rest}'


def _begin_stage(axes: Any, name: str, begin: int, steps: int, first: bool) -> None:
    """The stage's name above its steps, and a line where it begins."""
    if not first:
        axes.axvline(begin + 0.5, color=MUTED, linewidth=0.8, linestyle=":")
    axes.text(begin + steps / 2, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=9)


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    """Panels one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    found = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, found


def _save(figure: Any, path: Path) -> None:
    _as_written(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _as_written(figure: Any) -> None:
    """Names with dollar signs are names, not formulas."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
