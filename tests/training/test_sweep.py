"""Sweeps: every combination, optuna's own choice, going on, and what trials share."""

import json
from dataclasses import asdict
from pathlib import Path

import optuna
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_recipe

import finetune
from finetune.commands.tables import print_trials
from finetune.common.errors import Interrupted, RecipeError, TrainingError
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Base, Model
from finetune.training import shared
from finetune.training.shared import Shared
from finetune.training.sweep import SharedParts, SweepResult, Trial
from finetune.training.trainer import StageTrainer

RATE, RANK = "train.stages.0.learning_rate", "adapter.rank"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    tiny_recipe(folder)
    data = [
        {"path": str(folder / "data" / "train.csv"), "task": "classify", "hold_out_validation": 0.4},
        {"path": str(folder / "data" / "test.csv"), "task": "classify", "split": "test"},
    ]
    stages = [{"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 1.0e-2, "epochs": 1}]
    validation = {"every_n_steps": 2, "metric": "classify.accuracy"}
    return tiny_recipe(folder, data=data, train__stages=stages, train__validation=validation)


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Each load of an LLM."""
    names: list[str] = []
    real = shared.load_llm

    def load(components):
        names.append(components.model.llm.name)
        return real(components)

    monkeypatch.setattr(shared, "load_llm", load)
    return names


@pytest.mark.slow
def test_every_combination_is_trained_once_on_one_llm(recipe, tmp_path, loads):
    result = finetune.sweep(recipe, [f"{RATE}=1e-6,1e-2", f"{RANK}=2,4"], run=tmp_path / "run")
    tried = {(trial.values[RATE], trial.values[RANK]) for trial in result.trials}
    assert tried == {("1e-6", "2"), ("1e-6", "4"), ("1e-2", "2"), ("1e-2", "4")} and len(result.trials) == 4
    assert len(loads) == 1
    complete = [trial for trial in result.trials if trial.state == "complete"]
    best = max(complete, key=lambda trial: trial.score)
    assert result.best == best.trial and result.metric == "classify.accuracy"
    assert json.loads((tmp_path / "run" / "sweep.json").read_text()) == asdict(result)
    assert (tmp_path / "run" / "plots" / "sweep.png").stat().st_size > 5000
    kept = load_recipe(tmp_path / "run" / "best.yaml")
    assert (kept.train.stages[0].learning_rate, kept.adapter.rank) == (
        float(best.values[RATE]),
        int(best.values[RANK]),
    )
    for trial in complete:
        assert trial.score == max(trial.passes)
        assert trial.scores["classify"]["accuracy"] == pytest.approx(trial.score, abs=1e-4)


@pytest.mark.slow
def test_a_trial_ends_on_the_weights_of_a_training_alone(recipe, tmp_path):
    """What came before on the shared LLM leaves nothing behind."""
    finetune.sweep(recipe, [f"{RATE}=3e-2,1e-2"], run=tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "sweep.json").read_text())["trials"]
    last = max(rows, key=lambda row: row["trial"])
    alone = finetune.train(load_recipe(recipe, [f"{RATE}={last['values'][RATE]}"]), tmp_path / "alone").path
    for name in ("adapter_model.safetensors", "projectors.safetensors"):
        one = load_file(tmp_path / "run" / f"trial-{last['trial']:03d}" / "adapter" / name)
        two = load_file(alone / "adapter" / name)
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(one[key], two[key], atol=1e-6, rtol=0, msg=key)


@pytest.mark.slow
def test_parts_that_a_trial_changes_are_loaded_anew(recipe, tmp_path, loads):
    finetune.sweep(recipe, ["model.llm.quantize=none,nf4"], run=tmp_path / "run")
    assert len(loads) == 2
    result = finetune.sweep(recipe, ["model.projectors.image.kind=linear,mlp"], run=tmp_path / "projectors")
    assert {trial.state for trial in result.trials} == {"complete"}


@pytest.mark.slow
def test_optuna_chooses_within_a_range_and_goes_on_where_it_stopped(recipe, tmp_path):
    over = [f"{RATE}=1e-4..1e-1", f"{RANK}=2..4"]
    one = finetune.sweep(recipe, over, 2, run=tmp_path / "run")
    more = finetune.sweep(recipe, over, 4, run=tmp_path / "run")
    assert more.trials[:2] == one.trials and len(more.trials) == 4
    assert all(1e-4 <= trial.values[RATE] <= 1e-1 and trial.values[RANK] in (2, 3, 4) for trial in more.trials)
    assert len({trial.values[RATE] for trial in more.trials}) == 4
    with pytest.raises(TrainingError, match="began with another recipe"):
        finetune.sweep(recipe, [f"{RATE}=1e-4..1e-2"], 4, run=tmp_path / "run")


@pytest.mark.slow
def test_what_a_killed_sweep_left_running_comes_again(recipe, tmp_path, monkeypatch):
    over = [f"{RATE}=1e-3,1e-2"]
    with monkeypatch.context() as patched:
        patched.setattr(StageTrainer, "training_step", lambda *a, **k: (_ for _ in ()).throw(SystemExit("killed")))
        with pytest.raises(SystemExit):
            finetune.sweep(recipe, over, run=tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(StageTrainer, "training_step", lambda *a, **k: (_ for _ in ()).throw(Interrupted("asked to")))
        with pytest.raises(Interrupted, match="go on with the same command"):
            finetune.sweep(recipe, over, run=tmp_path / "run")
    result = finetune.sweep(recipe, over, run=tmp_path / "run")
    assert {trial.values[RATE] for trial in result.trials if trial.state == "complete"} == {"1e-3", "1e-2"}


@pytest.mark.slow
def test_a_trial_that_does_worse_than_others_ends_early(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda **_: optuna.pruners.ThresholdPruner(lower=2.0))
    with pytest.raises(TrainingError, match="none of 2 trials is complete"):
        finetune.sweep(recipe, [f"{RATE}=1e-3,1e-2"], run=tmp_path / "run")
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'run' / 'study.sqlite3'}")
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "PRUNED"]
    assert all(len(trial.intermediate_values) == 1 for trial in study.trials)
    assert not list((tmp_path / "run").glob("trial-*/checkpoints"))


@pytest.mark.slow
def test_a_failing_trial_is_told_and_the_others_go_on(recipe, tmp_path, capfd, monkeypatch):
    real = StageTrainer.training_step

    def step(self, model, inputs, items=None):
        if self.args.learning_rate > 1:
            raise TrainingError("the loss is inf at step 1")
        return real(self, model, inputs, items)

    monkeypatch.setattr(StageTrainer, "training_step", step)
    result = finetune.sweep(recipe, [f"{RATE}=10,1e-2"], run=tmp_path / "run")
    states = {trial.values[RATE]: trial.state for trial in result.trials}
    assert states == {"10": "fail", "1e-2": "complete"} and len(result.trials) == 2
    assert "trial 0 failed: the loss is inf" in capfd.readouterr().err
    assert finetune.sweep(recipe, [f"{RATE}=10,1e-2"], run=tmp_path / "run") == result  # nothing is tried again


def test_errors_are_shown_as_they_are(tmp_path, capsys):
    """They are selected by their negative."""
    trials = [
        Trial(0, "complete", None, {RANK: "2"}, -0.5, {}, 3.0, [-0.5]),
        Trial(1, "complete", None, {RANK: "4"}, -0.25, {}, None, [-0.25]),
    ]
    metric = "score.mean_absolute_error"
    result = SweepResult("recipe.yaml", str(tmp_path), "cpu", metric, 1, 0, 40, None, trials)
    header, rows = result.table()
    assert header == ["trial", RANK, f"{metric} ↓", "passes", "seconds"]
    assert rows == [["1 (best)", "4", "0.2500", "1", ""], ["0", "2", "0.5000", "1", "3"]]
    print_trials(result)
    for shown in (result._repr_html_(), capsys.readouterr().out):
        assert "0.2500" in shown and "-0.2500" not in shown and "n = 40 validation rows; ↓ lower is better" in shown


@pytest.mark.parametrize(
    "over, trials, match",
    [
        ("adapter.rang=2,4", None, "adapter.rang: unknown key.*adapter.rank"),
        ("adapter.rank=2,many", None, "adapter.rank"),
        ("adapter.rank", None, "write key=value1,value2"),
        ("adapter.rank=2..8", None, "trials="),
        ("adapter.rank=8..2", 3, "low end comes first"),
        ("adapter.rank=0..8", 3, "adapter.rank"),
        ("train.validation=null", None, "write train.validation"),
    ],
)
def test_what_no_recipe_takes_is_told_before_anything_trains(over, trials, match, recipe, tmp_path):
    with pytest.raises(RecipeError, match=match):
        finetune.sweep(recipe, [over], trials, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_trials_over_another_base_share_nothing(recipe, monkeypatch):
    monkeypatch.setattr(Shared, "load", classmethod(lambda cls, recipe: object()))
    parts, given = SharedParts(), load_recipe(recipe, ["train.stages.0.trains=[adapter]"])
    bases = [Base(name="org/one"), Base(name="org/two"), Base(name="org/two", quantize="none")]
    recipes = [given.model_copy(update={"model": Model(base=base)}) for base in bases]
    shared_by = [parts.of(one) for one in (*recipes, recipes[-1])]
    assert len({id(one) for one in shared_by}) == 3 and shared_by[2] is shared_by[3]
