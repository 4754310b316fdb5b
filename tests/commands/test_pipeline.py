"""The whole way on a tiny recipe: train, evaluate, merge, chat."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_recipe

import finetune
from finetune.common.errors import ArtifactError, MergeRefused, ModelError, TrainingError
from finetune.merging.merge import SAME

CLI = [sys.executable, "-m", "finetune.commands.cli"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(finetune.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def command(*arguments, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*CLI, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, timeout=120
    )


def trained(folder: Path, **changes) -> Path:
    return finetune.train(finetune.load_recipe(tiny_recipe(folder, **changes)), folder / "run").path


@pytest.fixture(scope="module", params=["none", "nf4"])
def finished(request, tmp_path_factory):
    """A run that went all the way."""
    folder = tmp_path_factory.mktemp(request.param)
    run = trained(folder, model__llm={"name": str(folder / "llm"), "quantize": request.param})
    finetune.evaluate(run)
    finetune.merge(run)
    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A trained run over a 16-bit LLM, to be copied and spoilt."""
    folder = tmp_path_factory.mktemp("plain")
    return trained(folder)


def copy_of(run: Path, to: Path) -> Path:
    shutil.copytree(run, to / "run")
    return to / "run"


def test_metrics_have_their_form(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics) == {
        *("train", "seconds", "peak_memory_bytes", "energy_joules", "scores", "intervals", "tables")
    }
    conditions = {"tuned", "base", "blank", "shuffled", "probe"}
    assert set(metrics["scores"]) == {"classify"}
    for metric, table in metrics["scores"]["classify"].items():
        assert set(table) == conditions, metric
        assert all(value is None or 0 <= value <= 1 for value in table.values())
    assert metrics["train"]["rows"] == 12 and metrics["train"]["packed"] is True
    assert list(metrics["train"]["stages"]) == ["align", "tune"]
    for stage in metrics["train"]["stages"].values():
        assert len(stage["losses"]) == stage["steps"] > 0
        assert all(loss > 0 for loss in stage["losses"])
    assert metrics["train"]["stages"]["tune"]["samples"] == 24  # two epochs
    assert metrics["train"]["stages"]["tune"]["tokens"] == 2 * metrics["train"]["tokens_per_epoch"]
    assert {"train", "evaluate", "decode", "encode", "llm"} <= set(metrics["seconds"])
    assert all(seconds >= 0 for seconds in metrics["seconds"].values())
    assert metrics["peak_memory_bytes"]["train_cpu"] > 10**7


def test_predictions_stand_beside_their_targets(finished):
    rows = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    lines = (finished.parent / "data" / "test.csv").read_text().splitlines()
    for row in rows:  # a sample of the file, in its order
        assert lines[int(row["row"].split(":")[1]) - 1].endswith(f",{row['target']}")
    assert [row["row"] for row in rows] == sorted({row["row"] for row in rows})
    scores = json.loads((finished / "metrics.json").read_text())["scores"]["classify"]["accuracy"]
    for condition in ("tuned", "base", "blank", "shuffled"):
        assert scores[condition] == sum(row[condition] == row["target"] for row in rows) / 4


def test_the_certificate_is_of_what_stands_on_disk(finished):
    certificate = json.loads((finished / "certificate.json").read_text())
    assert certificate["saved"]["agreement"] >= certificate["bounds"]["min_agreement"]
    assert certificate["saved"]["kl_from_base"] > SAME
    kept = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (finished / "merged").iterdir()
        if path.name != "certificate.json"
    }
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= kept.keys() and certificate["sha256"] == kept
    assert (finished / "merged" / "certificate.json").read_bytes() == (finished / "certificate.json").read_bytes()
    assert certificate["saved"]["kl"] == pytest.approx(
        min(c["kl"] for c in certificate["candidates"].values()), abs=1e-6
    )


def test_merged_and_adapter_folder_answer_alike(finished, tmp_path):
    """The merged folder needs nothing but itself; the adapter folder is read with its base."""
    picture = finished.parent / "data" / "images" / "test0.png"
    moved = shutil.copytree(finished / "merged", tmp_path / "elsewhere")
    merged, adapter = finetune.load(moved), finetune.load(finished / "adapter")
    assert finetune.chat(finished / "merged", "What is this?", picture, max_new_tokens=8) == merged.answer(
        "What is this?", image=picture, max_new_tokens=8
    )
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        difference = merged.model(ids).logits.log_softmax(-1) - adapter.model(ids).logits.log_softmax(-1)
        assert difference.exp().sub(1).abs().mean() < 0.05
        rows = torch.randn(1, 16, 16)
        torch.testing.assert_close(merged.model.project("image", [rows]), adapter.model.project("image", [rows]))


def test_the_frozen_llm_is_what_it_was(finished):
    """An adapter of zero over the base in the folder gives the base: nothing else was saved or changed."""
    names = set(load_file(finished / "adapter" / "adapter_model.safetensors"))
    assert names and all("lora_" in name for name in names)
    assert {name.partition(".")[0] for name in load_file(finished / "adapter" / "projectors.safetensors")} == {
        "projectors"
    }


def test_the_base_condition_is_the_untrained_model(plain, tmp_path):
    """Scores of `base` don't depend on what was trained."""
    run = copy_of(plain, tmp_path)
    finetune.evaluate(run)
    before = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    spoil(run, lambda name, tensor: tensor + torch.randn_like(tensor))
    finetune.evaluate(run)
    after = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [row["base"] for row in before] == [row["base"] for row in after]
    assert [row["tuned"] for row in before] != [row["tuned"] for row in after]


def spoil(run: Path, change) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path)


def test_an_adapter_that_learnt_nothing_is_not_merged(plain, tmp_path):
    run = copy_of(plain, tmp_path)
    spoil(run, lambda name, tensor: torch.zeros_like(tensor) if "lora_B" in name else tensor)
    done = command("merge", run)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr and "equals the untrained LLM" in " ".join(done.stderr.split())
    assert not list(run.glob("merged*")) and not (run / "certificate.json").exists()


def test_a_merge_that_changes_answers_is_refused(plain, tmp_path):
    """float16 has no room for so large an update: what is merged isn't what was trained."""
    run = copy_of(plain, tmp_path)
    recipe = (run / "recipe.yaml").read_text()
    start = recipe.index("\nmerge:")
    (run / "recipe.yaml").write_text(recipe[:start] + recipe[start:].replace("dtype: auto", "dtype: float16"))
    spoil(run, lambda name, tensor: 1e6 * tensor if "0.mlp.up_proj.lora_" in name else tensor)
    with pytest.raises(MergeRefused, match="another next token"):
        finetune.merge(run)
    assert not list(run.glob("merged*")) and not (run / "certificate.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter__rslora": True},
        {"adapter__dora": True},
        {"adapter__initialization": "pissa"},
        {"adapter__initialization": "olora"},
        {"adapter__targets": ["q_proj", "v_proj"]},
        {"adapter__initialization": "olora", "model__llm__quantize": "nf4"},
        {"adapter__dora": True, "model__llm__quantize": "nf4"},
    ],
    ids=lambda changes: " ".join(str(value) for value in changes.values()),
)
def test_every_kind_of_adapter_merges_into_what_was_trained(changes, tmp_path):
    run = trained(tmp_path, **changes)
    certificate = finetune.merge(run)
    assert certificate.saved.agreement >= 0.95
    assert certificate.saved.kl < 0.1 * certificate.base.kl


def test_an_adapter_that_peft_cannot_make_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="PiSSA"):
        trained(tmp_path, adapter__initialization="pissa", model__llm__quantize="nf4")


def test_training_without_a_cache_ends_on_the_same_adapter(plain, tmp_path):
    recipe = finetune.load_recipe(plain.parent / "recipe.yaml", ["train.cache=false"])
    other = finetune.train(recipe, tmp_path / "run").path
    for name in ("adapter_model.safetensors", "projectors.safetensors"):
        left, right = load_file(plain / "adapter" / name), load_file(other / "adapter" / name)
        for key in left.keys() | right.keys():
            torch.testing.assert_close(left[key], right[key], atol=1e-6, rtol=0)


def test_a_run_that_is_there_is_not_overwritten(plain):
    recipe = finetune.load_recipe(plain.parent / "recipe.yaml")
    with pytest.raises(TrainingError, match="--resume"):
        finetune.train(recipe, plain)
    with pytest.raises(TrainingError, match="recipe isn't the one"):
        finetune.train(finetune.load_recipe(plain.parent / "recipe.yaml", ["seed=4"]), plain, resume=True)


def test_a_finished_run_that_is_resumed_ends_on_the_same_adapter(plain, tmp_path):
    run = copy_of(plain, tmp_path)
    before = load_file(run / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(run / "adapter")
    finetune.train(finetune.load_recipe(plain.parent / "recipe.yaml"), run, resume=True)
    after = load_file(run / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    for verb in (finetune.evaluate, finetune.merge, lambda path: finetune.chat(path, "x")):
        with pytest.raises(ArtifactError, match=str(tmp_path)):
            verb(tmp_path)


def test_the_command_line_goes_the_whole_way(tmp_path):
    recipe = tiny_recipe(tmp_path)
    done = command("run", recipe, "--run", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "answer:" in done.stdout and (tmp_path / "run" / "merged" / "config.json").is_file()
    done = command("chat", tmp_path / "run", "What is this?", "--image", tmp_path / "data/images/test1.png")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_recipe_is_answered_in_plain_words(tmp_path):
    recipe = tiny_recipe(tmp_path, adapter={"rnak": 4})
    done = command("train", recipe, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "adapter.rnak" in done.stderr and "rank" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_missing_picture_is_found_by_check(tmp_path):
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "data" / "images" / "train3.png").unlink()
    done = command("check", recipe)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "train.csv:5" in done.stderr and "train3.png" in done.stderr


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom finetune.commands.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "chat" in done.stdout
