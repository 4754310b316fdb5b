"""A run whose rows are answered by every head, validated while it trains: from training to the merged folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import COLOURS
from trained_runs import HEADS, project_copy

import finetune
from finetune.common.errors import DataError, RecipeError, TrainingError
from finetune.data.sample import Medium, Message
from finetune.recipe.load import load_recipe
from finetune.training.validation import ValidationCallback

pytestmark = pytest.mark.slow  # its run takes long
NAMES = tuple(HEADS)


@pytest.fixture(scope="module")
def finished(finished_run):
    return finished_run("heads")


@pytest.fixture
def recipe(finished, tmp_path):
    """The recipe of the finished run, with features of its own."""
    return load_recipe(finished.parent / "recipe.yaml", [f"train.cache_folder={tmp_path / 'cache'}"])


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_head_is_scored_by_its_task(finished):
    metrics = read(finished / "metrics.json")
    scores = metrics["scores"]
    assert list(scores) == list(NAMES)
    assert {"accuracy", "f1", "auroc", "calibration_error"} <= set(scores["colour"])
    assert {"accuracy", "auroc"} <= set(scores["likely"]) and "mean_absolute_error" in scores["mark"]
    assert "mrr" in scores["order"] and "auroc" not in scores["words"]
    assert set(scores["words"]["accuracy"]) == {"tuned", "base"}  # there is no picture to blank
    surprise = scores["words"]["error_nats_per_token"]
    assert 0 < surprise["tuned"] < surprise["base"] and "error_nats_per_token" not in scores["likely"]
    assert set(scores["colour"]["accuracy"]) == {"tuned", "base", "blank", "shuffled", "probe"}
    for name, table in scores.items():
        for metric, values in table.items():
            for condition, (low, high) in metrics["intervals"][name].get(metric, {}).items():
                assert low <= values[condition] + 1e-4 and values[condition] <= high + 1e-4, (name, metric, condition)
    assert metrics["tables"]["colour"]["confusion"]["labels"][:4] == sorted(COLOURS)
    roles = read(finished / "metrics.json")["train"]["stages"]["tune"]["trained_weights"]
    assert set(roles) == {"projectors.image", "adapter", "heads.colour", "heads.mark", "heads.order"}


def test_it_has_learned_from_the_picture(finished):
    scores = read(finished / "metrics.json")["scores"]
    assert scores["colour"]["accuracy"]["tuned"] > scores["colour"]["accuracy"]["blank"]
    losses = read(finished / "metrics.json")["train"]["stages"]["tune"]["losses"]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_labels_are_always_labels(finished):
    rows = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    for row in rows:
        if row["task"] in ("colour", "likely"):
            for condition in ("tuned", "base", "blank", "shuffled"):
                assert row[condition]["label"] in COLOURS
                assert sum(row[condition]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        if row["task"] in ("mark", "order"):
            assert isinstance(row["tuned"], float)
        assert isinstance(row["good"], float)


def test_the_weights_of_the_best_pass_are_kept(finished):
    stage = read(finished / "metrics.json")["train"]["stages"]["tune"]
    passes = stage["validation"]
    assert [one["step"] for one in passes] == [*range(0, stage["steps"], 10), stage["steps"]][: len(passes)]
    assert all(set(one["scores"]) == set(NAMES) for one in passes)
    best = max(passes, key=lambda one: one["score"])
    assert stage["best_step"] == best["step"] and best["score"] > passes[0]["score"]
    assert not (finished / "checkpoints" / "tune" / "best").exists()


def test_adapter_and_merged_folder_judge_alike(finished, tmp_path):
    picture = finished.parent / "rows" / "images" / "colour-test-0.png"
    merged, adapter = (
        finetune.load(shutil.copytree(finished / "merged", tmp_path / "away")),
        finetune.load(finished / "adapter"),
    )
    for task in ("colour", "likely"):
        one, two = (m.probabilities("What is this?", task=task, image=picture) for m in (merged, adapter))
        assert set(one) == set(COLOURS) and one == pytest.approx(two, abs=1e-3)
    for task in ("mark", "order"):
        one, two = (m.number("How good?", task=task, image=picture) for m in (merged, adapter))
        assert one == pytest.approx(two, abs=1e-2)
    with pytest.raises(DataError, match="colour, likely"):
        merged.probabilities("What is this?", image=picture)
    with pytest.raises(DataError, match="'words' isn't answered by a number; these are: mark, order"):
        merged.number("What is this?", task="words", image=picture)
    certificate = read(finished / "certificate.json")
    assert certificate["saved"]["agreement"] > 0.95 and certificate["saved"]["kl_from_base"] > 1e-4


def test_evaluation_says_what_a_fresh_load_says(finished):
    """A prediction on file is what the adapter folder answers, asked by hand."""
    rows = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    assistant = finetune.load(finished / "adapter")
    for name in ("colour", "likely", "mark", "order"):
        row = next(row for row in rows if row["task"] == name)
        media = tuple(Medium(kind, Path(path)) for kind, path in zip(row["kinds"], row["media"], strict=True))
        said = assistant.ask(name, [[Message("user", (*media, row["question"]))]])[0]
        if name in ("colour", "likely"):
            assert said.probabilities == pytest.approx(row["tuned"]["probabilities"], abs=1e-3)
        else:
            assert said.number == pytest.approx(row["tuned"], abs=1e-2)


def test_chat_answers_by_the_head_that_is_named(finished):
    picture = finished.parent / "rows" / "images" / "colour-test-0.png"
    said = finetune.chat(finished, "What is this?", picture, task="colour")
    assert said.split()[0] in COLOURS and ": " in said
    assert float(finetune.chat(finished, "How good?", picture, task="mark")) > 0


@pytest.mark.slow
def test_a_run_cut_short_ends_as_a_whole_one(finished, recipe, tmp_path, monkeypatch):
    """Mixed sources, heads and validation: resumed in the middle, to the same weights and the same curve."""
    real = ValidationCallback.validate

    def cut(self, step, control):
        real(self, step, control)
        if len(self.history) == 3:
            raise OSError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(ValidationCallback, "validate", cut)
        with pytest.raises(OSError):
            finetune.train(recipe, tmp_path / "run")
    before = read(max(tmp_path.glob("run/checkpoints/tune/checkpoint-*/seconds.json")))["stage"]
    finetune.train(recipe, tmp_path / "run", resume=True)
    seconds = read(tmp_path / "run" / "metrics.json")["seconds"]
    assert 0 < before < seconds["llm"] < seconds["train"] and seconds["encode"] > 0
    whole, resumed = (read(run / "metrics.json")["train"]["stages"]["tune"] for run in (finished, tmp_path / "run"))
    assert [one["scores"] for one in resumed["validation"]] == [one["scores"] for one in whole["validation"]]
    assert resumed["best_step"] == whole["best_step"] and resumed["seconds_before"] == before < resumed["seconds"]
    for name in ("adapter_model.safetensors", "projectors.safetensors"):
        one, two = (load_file(run / "adapter" / name) for run in (finished, tmp_path / "run"))
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(one[key], two[key], atol=1e-6, rtol=0, msg=key)


@pytest.mark.slow
def test_heads_mean_what_they_meant_when_they_were_trained(finished, tmp_path):
    """Rows that are added or changed afterwards move no label and no scale."""
    run = project_copy(finished, tmp_path)
    path = tmp_path / "rows" / "mark-train.csv"
    path.write_text(path.read_text().replace(",4,", ",400,"))
    scores = finetune.evaluate(run).scores
    finetune.merge(run)
    tuned = {name: values["tuned"] for name, values in scores["mark"].items()}
    kept = read(finished / "metrics.json")["scores"]["mark"]
    assert tuned == pytest.approx({name: values["tuned"] for name, values in kept.items()}, abs=1e-3)
    config = read(run / "merged" / "config.json")
    assert config["parts"]["bindings"]["mark"] == read(finished / "adapter" / "multimodal.json")["bindings"]["mark"]


def test_a_run_is_not_resumed_on_other_targets(finished, tmp_path, monkeypatch):
    def cut(self, step, control):
        raise OSError("power cut")

    project_copy(finished, tmp_path)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    with monkeypatch.context() as patched:
        patched.setattr(ValidationCallback, "validate", cut)
        with pytest.raises(OSError):
            finetune.train(recipe, tmp_path / "again")
    path = tmp_path / "rows" / "mark-train.csv"
    path.write_text(path.read_text().replace(",4,", ",3,"))
    with pytest.raises(TrainingError, match="training rows or their media have changed"):
        finetune.train(recipe, tmp_path / "again", resume=True)


def test_a_stage_ends_early_when_validation_gets_no_better(finished, tmp_path):
    stages = [{"name": "tune", "trains": ["heads"], "learning_rate": 1.0e-12, "epochs": 3, "scheduler": "constant"}]
    validation = {"every_n_steps": 2, "limit": 8, "metric": "mark.mean_absolute_error", "patience": 2}
    recipe = changed_recipe(finished, tmp_path, stages=stages, validation=validation)
    run = finetune.train(load_recipe(recipe), tmp_path / "run").path
    stage = read(run / "metrics.json")["train"]["stages"]["tune"]
    assert [one["step"] for one in stage["validation"]] == [0, 2, 4] and len(stage["losses"]) == 4
    assert stage["best_step"] == 0


def changed_recipe(finished, folder, **train):
    """The recipe of the finished run with other keys of `train`."""
    content = read(finished.parent / "recipe.yaml")
    content["train"] |= {"cache_folder": str(folder / "cache"), **train}
    (folder / "recipe.yaml").write_text(json.dumps(content, indent=2))
    return folder / "recipe.yaml"


def test_a_metric_that_is_not_there_is_told_before_anything_trains(finished, tmp_path):
    recipe = changed_recipe(finished, tmp_path, validation={"every_n_steps": 2, "metric": "colour.beauty"})
    with pytest.raises(TrainingError, match=r"no 'colour.beauty'.*colour.accuracy"):
        finetune.train(load_recipe(recipe), tmp_path / "run")
    recipe = changed_recipe(finished, tmp_path, validation={"every_n_steps": 2, "metric": "shade.accuracy"})
    with pytest.raises(RecipeError, match="its first part is one of colour, likely"):
        load_recipe(recipe)


def test_heads_that_cannot_work_are_refused_with_the_recipe(finished, tmp_path):
    path = changed_recipe(finished, tmp_path)
    whole = read(path)

    def refused(match, **changes):
        changed = json.loads(json.dumps(whole))
        for number, keys in changes.items():
            changed["data"][int(number[1:])] |= keys
        path.write_text(json.dumps(changed))
        with pytest.raises(RecipeError, match=match):
            load_recipe(path)

    refused(r"data.0.head.*'score' can't answer the task 'classify': write language or label", _0={"head": "score"})
    refused(r"data.2.head.*data.0 .*'label'", _2={"head": "language"})
    refused(r"data.1.name.*data.0 .*'colour'", _1={"name": "hue"})
    refused("compares rows of a group", _6={"head": {"kind": "score", "loss": "pairwise"}})
    refused(r"data.0.head.*no training rows", _0={"split": "validation"})
    whole["train"]["stages"][0]["trains"] = ["projectors", "adapter"]
    refused("'label' has weights that no stage trains: add 'heads'", _1={})
    whole["train"]["stages"][0]["trains"] = ["heads"]
    whole["data"] = [source for source in whole["data"] if source["name"] == "words"]
    whole["train"]["validation"] = None
    refused("'heads'", _0={})
