"""The whole way on a tiny recipe: train, evaluate, merge, chat."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli import cli
from safetensors.torch import load_file, save_file
from tiny import tiny_llm_folder, tiny_recipe
from trained_runs import copy_of, file_digests, trained
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import finetune
from finetune.common.errors import ArtifactError, MergeRefused, ModelError, TrainingError
from finetune.merging.merge import SAME

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["plain", pytest.param("nf4", marks=pytest.mark.slow)])
def finished(request, finished_run):
    """A run that went all the way, over a 16-bit and over a 4-bit LLM."""
    return finished_run(request.param)


@pytest.fixture(scope="module")
def plain(finished_run):
    return finished_run("plain")


def test_metrics_are_those_of_the_files(finished):
    """Weights are counted in the adapter's files, tokens by the tokenizer, steps by their losses."""
    metrics = json.loads((finished / "metrics.json").read_text())
    recipe = json.loads((finished.parent / "recipe.yaml").read_text())
    rows = (finished.parent / "data" / "train.csv").read_text().splitlines()[1:]
    placeholders = {"mlp": 16, "pixel_shuffle": 4}[recipe["model"]["projectors"]["image"]["kind"]]
    tokenizer = AutoTokenizer.from_pretrained(finished.parent / "llm")
    tokens = 0
    for row in rows:
        question = "<|im_start|>user\n<|endoftext|>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
        text = f"{question}{row.partition(',')[2]}<|im_end|>"
        tokens += len(tokenizer(text, add_special_tokens=False)["input_ids"]) - 1 + placeholders
    assert metrics["train"]["rows"] == len(rows) and metrics["train"]["tokens_per_epoch"] == tokens
    saved = {name: load_file(finished / "adapter" / f"{name}.safetensors") for name in ("projectors", "adapter_model")}
    counts = {name: sum(tensor.numel() for tensor in tensors.values()) for name, tensors in saved.items()}
    weights = {"align": {"projectors.image": counts["projectors"]}}
    weights["tune"] = weights["align"] | {"adapter": counts["adapter_model"]}
    for epochs, (name, stage) in zip((1, 2), metrics["train"]["stages"].items(), strict=True):
        assert stage["trained_weights"] == weights[name]
        assert stage["samples"] == epochs * len(rows) and stage["tokens"] == epochs * tokens
        assert epochs * math.ceil(tokens / 96) <= stage["steps"] == len(stage["losses"]) < stage["samples"]
        assert sum(stage["losses"][-3:]) < sum(stage["losses"][:3])
    assert set(metrics["scores"]) == {"classify"}
    for metric, values in metrics["scores"]["classify"].items():
        assert set(values) == {"tuned", "base", "blank", "shuffled", "probe"}, metric
    assert {"train", "evaluate", "decode", "encode", "llm"} <= set(metrics["seconds"])
    assert metrics["peak_memory_bytes"]["train_cpu"] > 10**8  # torch alone takes as much


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
    kept = file_digests(finished / "merged")
    del kept["certificate.json"]
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


def test_the_frozen_llm_is_what_it_was(finished, tmp_path):
    """Nothing but LoRA was saved of the LLM, its files are the same, and an adapter of zero over them gives its
    logits to the bit.
    """
    again = tiny_llm_folder(tmp_path / "llm")
    assert file_digests(finished.parent / "llm") == file_digests(again)
    run = copy_of(finished, tmp_path)
    spoil(run, lambda name, tensor: torch.zeros_like(tensor) if "lora_B" in name else tensor)
    names = set(load_file(run / "adapter" / "adapter_model.safetensors"))
    assert names and all("lora_" in name for name in names)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    options = {}
    if json.loads((finished.parent / "recipe.yaml").read_text())["model"]["llm"]["quantize"] == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    bare = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32, **options)
    # With gradients: on some CPUs bitsandbytes rounds its scales otherwise where none are needed.
    assert torch.equal(finetune.load(run / "adapter").model(ids).logits, bare(ids).logits)


def test_merging_changes_the_layers_that_were_trained_and_no_others(plain):
    before, after = load_file(plain.parent / "llm" / "model.safetensors"), load_file(plain / "merged/model.safetensors")
    lora = load_file(plain / "adapter/adapter_model.safetensors")
    adapted = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in lora}
    changed = {name for name in before if not torch.equal(before[name], after[f"language_model.{name}"])}
    assert changed == {f"{name}.weight" for name in adapted}


def test_the_base_condition_is_the_untrained_model(plain, tmp_path):
    """Scores of `base` don't depend on what was trained."""
    run = copy_of(plain, tmp_path)
    before = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    spoil(run, lambda name, tensor: tensor + torch.randn_like(tensor))
    finetune.evaluate(run)
    after = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [row["base"] for row in before] == [row["base"] for row in after]
    assert [row["tuned"] for row in before] != [row["tuned"] for row in after]


def spoil(run: Path, change) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path)


def test_an_adapter_that_learned_nothing_is_not_merged(plain, tmp_path):
    run = copy_of(plain, tmp_path, "merged", "certificate.json")
    spoil(run, lambda name, tensor: torch.zeros_like(tensor) if "lora_B" in name else tensor)
    done = cli("merge", run)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr and "equals the LLM without the adapter" in " ".join(done.stderr.split())
    assert not list(run.glob("merged*")) and not (run / "certificate.json").exists()


def test_a_merge_that_changes_answers_is_refused(plain, tmp_path):
    """float16 has no room for so large an update: what is merged isn't what was trained."""
    run = copy_of(plain, tmp_path, "merged", "certificate.json")
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
        {"adapter__rslora": True, "adapter__targets": ["q_proj", "v_proj"]},
        {"adapter__dora": True},
        {"adapter__initialization": "pissa"},
        {"adapter__initialization": "olora", "model__llm__quantize": "nf4"},
        {"adapter__dora": True, "model__llm__quantize": "nf4"},
    ],
    ids=lambda changes: " ".join(str(value) for value in changes.values()),
)
def test_every_kind_of_adapter_merges_into_what_was_trained(changes, tmp_path):
    stage = {"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 5.0e-3, "epochs": 2}
    run = trained(tiny_recipe(tmp_path, train__stages=[stage], **changes))
    certificate = finetune.merge(run)
    assert certificate.saved.agreement >= 0.95
    assert certificate.saved.kl < 0.1 * certificate.base.kl


def test_an_adapter_that_peft_cannot_make_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="PiSSA"):
        trained(tiny_recipe(tmp_path, adapter__initialization="pissa", model__llm__quantize="nf4"))


def test_training_without_a_cache_ends_on_the_same_adapter(plain, tmp_path):
    other = trained(plain.parent / "recipe.yaml", ["train.cache=false"], tmp_path / "run")
    for name in ("adapter_model.safetensors", "projectors.safetensors"):
        left, right = load_file(plain / "adapter" / name), load_file(other / "adapter" / name)
        for key in left.keys() | right.keys():
            torch.testing.assert_close(left[key], right[key], atol=1e-6, rtol=0)


def test_a_run_that_is_there_is_not_overwritten(plain):
    recipe = finetune.load_recipe(plain.parent / "recipe.yaml")
    with pytest.raises(TrainingError, match="resume=True"):
        finetune.train(recipe, plain)
    with pytest.raises(TrainingError, match="recipe isn't the one"):
        finetune.train(finetune.load_recipe(plain.parent / "recipe.yaml", ["seed=4"]), plain, resume=True)


def test_a_finished_run_that_is_resumed_ends_on_the_same_adapter(plain, tmp_path):
    run = copy_of(plain, tmp_path)
    before = load_file(run / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(run / "adapter")
    finetune.train(finetune.load_recipe(plain.parent / "recipe.yaml"), run, resume=True)
    assert json.loads((run / "metrics.json").read_text())["train"]["resumed"]
    after = load_file(run / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    for verb in (finetune.evaluate, finetune.merge, lambda path: finetune.chat(path, "x")):
        with pytest.raises(ArtifactError, match=str(tmp_path)):
            verb(tmp_path)


def test_a_question_is_asked_on_the_command_line(plain):
    picture = plain.parent / "data/images/test1.png"
    done = cli("chat", plain, "What is this?", "--image", picture)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == finetune.load(plain / "merged").answer("What is this?", image=picture).strip()


def test_a_wrong_recipe_is_answered_in_plain_words(tmp_path):
    recipe = tiny_recipe(tmp_path, adapter={"rnak": 4})
    done = cli("train", recipe, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "adapter.rnak" in done.stderr and "rank" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_missing_picture_is_found_by_check(tmp_path):
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "data" / "images" / "train3.png").unlink()
    done = cli("check", recipe)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "train.csv:5" in done.stderr and "train3.png" in done.stderr


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom finetune.commands.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "chat" in done.stdout
