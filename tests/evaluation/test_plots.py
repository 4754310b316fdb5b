"""Plots: what is drawn is what was measured."""

import io

import matplotlib
import numpy as np
import PIL.Image
import pytest

from finetune.evaluation import plots
from finetune.evaluation.results import StageResult

STAGES = {
    "align": {"losses": [3.0, 2.0, 1.5, 1.2], "steps": 4, "validation": [], "best_step": None},
    "tune": {
        "losses": [1.0, 0.8, 0.6],
        "steps": 3,
        "validation": [
            {"step": 1, "scores": {"classify": {"accuracy": 0.25, "f1": None}, "words": {"exact_match": 0.5}}},
            {"step": 3, "scores": {"classify": {"accuracy": 0.75, "f1": 0.5}}},
        ],
        "best_step": 3,
    },
}
STAGES = {name: StageResult.model_validate(stage) for name, stage in STAGES.items()}
LOSSES = {name: stage.losses for name, stage in STAGES.items()}


def curves(figure) -> dict:
    return {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}


def test_losses_stand_at_their_steps_stage_after_stage(tmp_path):
    lines = [line.get_xydata().tolist() for line in plots.losses_figure(LOSSES).axes[0].lines]
    assert [[1, 3.0], [2, 2.0], [3, 1.5], [4, 1.2]] in lines
    assert [[5, 1.0], [6, 0.8], [7, 0.6]] in lines
    plots.losses(LOSSES, tmp_path / "plots" / "loss.png")
    with PIL.Image.open(tmp_path / "plots" / "loss.png") as picture:
        assert picture.width > 500 and len(picture.convert("L").getcolors()) > 2


def test_a_long_stage_keeps_its_ends_and_few_points():
    stages = {"long": list(np.linspace(5, 1, 100_000))}
    axes = plots.losses_figure(stages).axes[0]
    assert all(len(line.get_xdata()) <= 2 * plots.POINTS for line in axes.lines)
    assert axes.get_xlim()[1] == 100_001 and axes.lines[0].get_ydata()[0] == 5


def test_validation_scores_stand_at_their_steps_and_the_kept_one_is_marked():
    figure = plots.validation_figure(STAGES, "classify")
    found = curves(figure)
    assert found["accuracy"] == [[5, 0.25], [7, 0.75]] and found["F1"] == [[7, 0.5]]
    assert [x for x, _ in found["best step, kept"]] == [7, 7]
    assert curves(plots.validation_figure(STAGES, "words"))["exact match"] == [[5, 0.5]]
    assert plots.validation_figure(STAGES, "nothing") is None
    assert plots.validation_figure({"align": STAGES["align"]}, "classify") is None


def test_every_metric_has_a_line_of_its_own_and_scores_begin_at_zero():
    scores = {"classify": {f"metric_{number}": 0.0 for number in range(9)}}
    stage = StageResult.model_validate(
        {"steps": 2, "validation": [{"step": step, "scores": scores} for step in (1, 2)]}
    )
    axes = plots.validation_figure({"tune": stage}, "classify").axes[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 9
    assert axes.get_ylim()[0] == 0


def test_scores_of_every_condition_have_a_bar(tmp_path):
    table = {
        "classify": {"accuracy": {"tuned": 0.6, "base": 0.1, "probe": None}, "character_error_rate": {"tuned": 1.7}}
    }
    plots.scores(table, tmp_path / "scores.png")
    with PIL.Image.open(tmp_path / "scores.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(0x1B, 0x6C, 0xA8), (0x9A, 0x9A, 0x9A)} <= colours and (0x5A, 0x93, 0x67) not in colours


def test_calibration_shows_larger_dots_for_more_rows():
    axes = plots.calibration_figure([(0.25, 0.5, 10), (0.9, 0.8, 40)]).axes[0]
    (dots,) = axes.collections
    assert dots.get_offsets().tolist() == [[0.25, 0.5], [0.9, 0.8]]
    small, large = dots.get_sizes()
    assert large > 2 * small


@pytest.mark.parametrize("name", ["$x^2$", "a $ b", r"$\frac{", "<b>&", "标签"])
def test_names_are_drawn_as_they_are_written(name):
    """The same picture as that of a figure with formulas switched off."""
    with matplotlib.rc_context({"text.parse_math": False}):
        expected = io.BytesIO()
        plots.losses_figure({name: [1.0, 0.5]}).savefig(expected, format="png", dpi=plots.DPI)
    assert plots.png(plots.losses_figure({name: [1.0, 0.5]})) == expected.getvalue()


def test_a_sweep_is_drawn_for_numbers_and_names(tmp_path):
    trials = [({"rate": rate, "kind": kind}, rate * 10) for rate in (1e-4, 1e-2) for kind in ("mlp", "linear")]
    plots.sweep(trials, "classify.accuracy", tmp_path / "sweep.png")
    with PIL.Image.open(tmp_path / "sweep.png") as picture:
        assert picture.height > picture.width * 0.8  # a panel per key
