"""What `train.track` names gets every step's loss, rate and speed and the validation scores, a run for each stage."""

import signal
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_recipe

import finetune
from finetune.common.errors import Interrupted, RecipeError

STAGES = [
    {"name": "align", "trains": ["projectors"], "learning_rate": 1.0e-3, "epochs": 2},
    {"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 5.0e-3, "epochs": 4},
]


class Runs(MagicMock):
    """A tracker's log: `logged` has an entry for each run that begins, {step: its values}."""

    logged: list[dict[int, dict[str, float]]]


def tracker(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that stands for a tracker; only what transformers calls of it does something."""
    module = Runs(name=name, __spec__=ModuleSpec(name, None, origin=name), __version__="9.0", logged=[], run=None)

    def begin(**names: str) -> None:
        module.logged.append({})
        module.run = MagicMock()

    def log(values: dict[str, float], step: int | None = None) -> None:
        assert module.run is not None, "logged outside a run"
        step = int(values["train/global_step"]) if step is None else step
        module.logged[-1].setdefault(step, {}).update(values)

    def end() -> None:
        module.run = None

    module.init, module.log, module.finish = begin, log, end
    module.start_run, module.end_run, module.active_run = begin, end, lambda: module.run
    module.log_metrics = lambda metrics, step, synchronous: log(metrics, step)
    module.context_vars.current_space_id.get.return_value = None
    module.utils.validation = SimpleNamespace(MAX_PARAM_VAL_LENGTH=250, MAX_PARAMS_TAGS_PER_BATCH=100)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, f"{name}.sdk.lib.config_util", SimpleNamespace(ConfigError=KeyError))
    return module


def recipe_of(folder: Path, *track: str) -> finetune.Recipe:
    data = [{"path": str(folder / "data" / "train.csv"), "task": "classify", "hold_out_validation": 0.3}]
    data += [{"path": str(folder / "data" / "test.csv"), "task": "classify", "split": "test"}]
    validation = {"every_n_steps": 2, "metric": "classify.accuracy"}
    return finetune.load_recipe(
        tiny_recipe(folder, data=data, train__stages=STAGES, train__track=list(track), train__validation=validation)
    )


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: (step, value) of each} of the event files in a folder."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_step_of_an_interrupted_run_once(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path, "tensorboard", "trackio")
    trackio = tracker("trackio", monkeypatch)
    log = trackio.log

    def interrupting(values: dict[str, float]) -> None:
        log(values)
        if len(trackio.logged) == 2 and values["train/global_step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    trackio.log = interrupting
    with pytest.raises(Interrupted):
        finetune.train(recipe, tmp_path / "run")
    trackio.log = log
    run = finetune.train(recipe, tmp_path / "run", resume=True)
    for stage in STAGES:
        logged = scalars(run.path / "tensorboard" / stage["name"])
        steps = [step for step, _ in logged["train/loss"]]
        assert steps == [*range(1, 2 * stage["epochs"] + 1)]
        assert [step for step, _ in logged["train/learning_rate"]] == steps
        assert max(rate for _, rate in logged["train/learning_rate"]) <= stage["learning_rate"] * 1.0001
        assert len(logged["train/tokens_per_second"]) >= len(steps) - 2  # a process's first step has none
        assert [step for step, _ in logged["eval/score"]] == [0, *steps[1::2]] and "eval/classify/accuracy" in logged
    assert len(trackio.logged) == 3 and trackio.run is None  # align, tune, tune resumed


def test_each_stage_is_a_run_of_each_tracker(tmp_path, monkeypatch):
    modules = {name: tracker(name, monkeypatch) for name in ("wandb", "mlflow", "trackio")}
    finetune.train(recipe_of(tmp_path, *modules), tmp_path / "run")
    for name, module in modules.items():
        assert len(module.logged) == len(STAGES) and module.run is None, name
        prefix, score = ("", "eval_score") if name == "mlflow" else ("train/", "eval/score")
        for steps in module.logged:
            assert all(f"{prefix}loss" in steps[step] and f"{prefix}learning_rate" in steps[step] for step in (1, 2, 3))
            assert f"{prefix}tokens_per_second" in steps[2] and 0 <= steps[2][score] <= 1


def test_a_tracker_that_is_missing_is_named_before_anything_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"train.track.0: trackio isn't installed: pip install trackio"):
        finetune.check(recipe_of(tmp_path, "trackio"))
