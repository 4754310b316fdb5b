"""Validation passes: their steps, what they write and report, which weights stay, and when they end a stage."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from packed import composite_with_lora
from transformers import TrainerControl

from finetune.common.errors import TrainingError
from finetune.common.run_folder import damage
from finetune.evaluation.results import ValidationPass
from finetune.recipe.schema import Validation
from finetune.training import validation as module
from finetune.training.validation import ValidationCallback


class Stage:
    """A callback whose passes have these scores; before each pass the weights of the projector are its step."""

    def __init__(self, folder, scores, on_validation=None, **settings):
        self.model, self.scores, self.control = composite_with_lora(), iter(scores), TrainerControl()
        self.modes, self.shown, self.reported = [], [], []
        self.callback = ValidationCallback(
            self.model,
            folder,
            Validation(**settings),
            evaluate=self.evaluate,
            select=lambda scores: scores["mood"]["f1"],
            on_validation=on_validation,
        )
        self.callback.show = lambda answers, step: self.shown.append((answers, step))
        self.callback.report = self.reported.append

    @property
    def weight(self):
        return next(self.model.projectors["image"].parameters())

    @property
    def steps(self):
        return [one.step for one in self.callback.history]

    def evaluate(self):
        self.modes.append(self.model.training)
        return {"mood": {"f1": next(self.scores), "error": 2.00004}}, [0.123456, 1.0], ["an answer"]

    def passes(self, *steps):
        for step in steps:
            with torch.no_grad():
                self.weight.fill_(step)
            self.callback.validate(step, self.control)
        return self


@pytest.mark.parametrize("training", [True, False])
def test_a_pass_is_written_reported_and_shown(training, tmp_path, capsys):
    stage = Stage(tmp_path, [0.123456, 0.1])
    stage.model.train(training)
    stage.passes(3)
    assert stage.modes == [False] and stage.model.training is training
    written = {"step": 3, "score": 0.123456, "scores": {"mood": {"f1": 0.1235, "error": 2.0}}, "good": [0.1235, 1.0]}
    assert json.loads((tmp_path / "validation.json").read_text()) == {"passes": [written]}
    assert stage.callback.history == [ValidationPass.model_validate(written)] == [stage.callback.best]
    assert stage.shown == [(["an answer"], 3)]
    assert stage.reported == [{"eval_score": 0.123456, "eval_mood/f1": 0.1235, "eval_mood/error": 2.0}]
    assert json.loads((tmp_path / "best" / "pass.json").read_text()) == {"step": 3}
    assert damage(tmp_path / "best") is None and (tmp_path / "best" / "sha256.json").is_file()
    stage.passes(4)
    assert len(json.loads((tmp_path / "validation.json").read_text())["passes"]) == 2
    assert capsys.readouterr().err == "  step 3: validation 0.1235 (best)\n  step 4: validation 0.1000\n"
    assert not stage.control.should_training_stop and not stage.callback.ended


def test_passes_come_before_the_first_step_every_n_steps_and_after_the_last(tmp_path):
    stage = Stage(tmp_path, [0.1] * 4, every_n_steps=3, on_validation=lambda score: True)
    state = SimpleNamespace(global_step=0, max_steps=8)
    stage.callback.on_train_begin(None, state, stage.control)
    assert stage.control.should_training_stop
    stage.control.should_training_stop = False
    for state.global_step in range(1, 9):
        stage.callback.on_step_end(None, state, stage.control)
    assert stage.steps == [0, 3, 6, 8] and stage.control.should_training_stop


def test_a_resumed_stage_begins_with_the_passes_that_it_has(tmp_path):
    Stage(tmp_path, [0.1, 0.3, 0.2]).passes(0, 3, 6)
    resumed = Stage(tmp_path, [])
    resumed.callback.on_train_begin(None, SimpleNamespace(global_step=4, max_steps=8), resumed.control)
    assert resumed.steps == [0, 3] and resumed.callback.best.step == 3


def test_the_weights_of_the_first_of_the_best_passes_are_put_back(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(module.PartialState, "wait_for_everyone", lambda self: waited.append(stage.weight.max().item()))
    stage = Stage(tmp_path, [0.1, 0.3, 0.3, 0.2]).passes(0, 3, 6, 9)
    assert stage.callback.restore_best() == 3
    assert stage.weight.unique().tolist() == [3.0] and waited == [9.0]


def test_without_a_pass_the_weights_stay(tmp_path):
    stage = Stage(tmp_path, [])
    assert stage.callback.best is None and stage.callback.restore_best() is None and not stage.callback.exhausted


@pytest.mark.parametrize(
    "scores, patience, ends",
    [
        ([0.3, 0.3, 0.2], 2, 2),  # an equal pass is no better
        ([0.3, 0.2, 0.4, 0.1, 0.1], 2, 4),
        ([0.3, 0.2], 1, 1),
        ([0.3, 0.2, 0.2, 0.2], None, None),
        ([0.1, 0.2, 0.3, 0.4], 1, None),
    ],
)
def test_a_stage_ends_after_so_many_passes_that_are_no_better(scores, patience, ends, tmp_path):
    stage, stopped = Stage(tmp_path, scores, patience=patience), []
    for step in range(len(scores)):
        stage.passes(step)
        assert stage.control.should_training_stop is stage.callback.ended
        stopped.append(stage.callback.ended)
    assert stopped == [ends is not None and step >= ends for step in range(len(scores))]


def test_a_sweep_may_end_a_stage(tmp_path):
    seen = []

    def on_validation(score):
        seen.append(score)
        return score > 0.15

    stage = Stage(tmp_path, [0.1, 0.2], on_validation=on_validation).passes(0)
    assert not stage.callback.ended
    stage.passes(3)
    assert seen == [0.1, 0.2] and stage.callback.ended and stage.control.should_training_stop


@pytest.mark.parametrize("stop", [True, False])
def test_other_processes_act_on_what_the_first_has_found(stop, tmp_path, monkeypatch):
    found = ValidationPass(step=3, score=0.5)

    def broadcast(shared):
        assert shared == [None, False]
        shared[:] = [found, stop]

    monkeypatch.setattr(module.PartialState, "is_main_process", False)
    monkeypatch.setattr(module, "broadcast_object_list", broadcast)
    stage = Stage(tmp_path, []).passes(3)
    assert stage.callback.history == [found] and stage.control.should_training_stop is stop
    assert not list(tmp_path.iterdir())


def test_the_first_process_sends_what_it_has_found(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(module, "broadcast_object_list", lambda shared: sent.append([*shared]))
    stage = Stage(tmp_path, [0.5, 0.6], on_validation=lambda score: score == 0.6).passes(3, 6)
    assert sent == [[stage.callback.history[0], False], [stage.callback.history[1], True]]


@pytest.mark.parametrize(
    "step, steps, best",
    [(0, [0], None), (1, [0], None), (2, [0, 2], None), (3, [0, 2, 3], 3), (5, [0, 2, 3], 3), (6, [0, 2, 3, 6], 3)],
)
def test_a_pass_whose_weights_are_gone_is_not_the_best_any_more(step, steps, best, tmp_path):
    Stage(tmp_path, [0.1, 0.2, 0.3, 0.2]).passes(0, 2, 3, 6)
    resumed = Stage(tmp_path, [0.01, 0.005]).callback
    resumed.resume(step)
    assert [one.step for one in resumed.history] == steps
    assert (resumed.best and resumed.best.step) == best
    if best is None:  # the next pass is the best, whatever the lost ones scored
        resumed.validate(step + 1, TrainerControl())
        resumed.validate(step + 2, TrainerControl())
        assert resumed.best.step == step + 1
        assert json.loads((tmp_path / "best" / "pass.json").read_text()) == {"step": step + 1}


def test_damaged_best_weights_are_named_with_the_way_out(tmp_path):
    Stage(tmp_path, [0.1]).passes(2)
    resumed = Stage(tmp_path, []).callback
    (tmp_path / "best" / "projectors.safetensors").unlink()
    resumed.resume(1)  # without a pass so far there is nothing to end on
    with pytest.raises(TrainingError) as damaged:
        resumed.resume(2)
    assert str(damaged.value) == (
        f"{tmp_path}/best/projectors.safetensors is missing: these are the best weights so far. Remove {tmp_path}, and "
        "resume=True begins this stage anew"
    )
    shutil.rmtree(tmp_path / "best")
    with pytest.raises(TrainingError, match=r"best/sha256\.json is missing"):
        resumed.resume(2)


def test_a_stage_without_passes_is_resumed(tmp_path):
    callback = Stage(tmp_path, []).callback
    callback.resume(4)
    assert callback.history == [] and callback.lost_until == -1
