"""`train.cache: auto`: which recipes keep features on disk, and what a run keeps of the choice."""

import pytest
import yaml
from safetensors.torch import load_file
from tiny import tiny_recipe

from finetune.commands.check import check
from finetune.recipe.load import Recipe, load_recipe
from finetune.training import cache_choice
from finetune.training.cache_choice import choose_cache, feature_bytes
from finetune.training.plan.plan import plan
from finetune.training.train import train

STAGE = {"name": "align", "trains": ["projectors"], "learning_rate": 1.0e-3, "epochs": 2}


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    return load_recipe(tiny_recipe(tmp_path, train__cache="auto", train__stages=[STAGE]))


def test_encoders_that_train_are_not_cached(recipe):
    trains = ["projectors", "encoders.image"]
    tuned = recipe.with_(**{"tune_encoders": {"image": {"last_layers": 1}}, "train.stages.0.trains": trains})
    choice = choose_cache(tuned)
    assert (choice.cache, choice.reason) == (False, "cache: false, since the encoder of image trains")
    assert choice.reason in plan(tuned, "t4", advise=False).notes


def test_a_single_epoch_is_not_cached(recipe, monkeypatch):
    monkeypatch.setattr(cache_choice, "feature_bytes", lambda *_: pytest.fail("nothing needs to be read"))
    once = recipe.with_("train.stages.0.epochs=1")
    assert not choose_cache(once).cache and "one epoch" in choose_cache(once).reason
    assert choose_cache(once).reason in check(once).numbers


def test_the_disk_decides_and_its_features_are_those_that_a_run_writes(recipe, monkeypatch, tmp_path, capsys):
    (needed,) = feature_bytes(recipe)
    monkeypatch.setattr(cache_choice, "free_bytes", lambda folder: needed)
    assert not choose_cache(recipe).cache  # the disk would be full
    for free, cache in ((0, False), (2 * needed, True)):
        monkeypatch.setattr(cache_choice, "free_bytes", lambda folder, free=free: free)
        choice = choose_cache(recipe)
        assert choice.cache is cache and f"are free in {tmp_path / 'cache'}" in choice.reason
        assert choice.reason in plan(recipe, "t4", advise=False).notes
    assert any("where the disk has room" in number for number in check(recipe).numbers)
    run = train(recipe, tmp_path / "run")
    assert "cache: true, since 2 epochs" in capsys.readouterr().err
    assert yaml.safe_load(run.recipe.read_text())["train"].get("cache", True) is True
    written = [tensor for file in tmp_path.glob("cache/**/*.safetensors") for tensor in load_file(file).values()]
    assert needed == sum(tensor.nbytes for tensor in written) > 0
    monkeypatch.setattr(cache_choice, "free_bytes", lambda folder: 0)
    train(recipe, run, resume=True)  # a run keeps what it began with


def test_without_room_a_run_trains_all_the_same(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(cache_choice, "free_bytes", lambda folder: 0)
    run = train(recipe, tmp_path / "run")
    assert yaml.safe_load(run.recipe.read_text())["train"]["cache"] is False and not (tmp_path / "cache").exists()
