"""Answers by vLLM, without vLLM: what is written for it and sent to it, and what becomes of a server that fails, tried
on a program that only pretends to be one. `tests/engines` has the real one.
"""

import base64
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from families import ZOO, family_folder
from families.recipes import base_recipe
from packed import shake
from peft import PeftModel
from pretended_vllm import PretendedVllm, gone
from test_rewards import rewarded, shortness, stage_of, without_llm
from tiny import fresh_tokenizer, tiny_composite
from transformers import AutoModelForCausalLM

import finetune
from finetune.common.errors import RecipeError, TrainingError
from finetune.export._vllm.language_model import LanguageModelAlone
from finetune.model.adapter import attach
from finetune.recipe.schema import Adapter

VLLM = {"sampler": "vllm"}
ONE_EPOCH = {"epochs": 1}


@pytest.fixture
def vllm(tmp_path, monkeypatch) -> PretendedVllm:
    pretended = PretendedVllm(tmp_path / "vllm")
    monkeypatch.setenv("FINETUNE_VLLM", str(pretended.python))
    return pretended


def test_questions_go_as_embeddings_beside_the_adapter_of_the_moment(tmp_path, vllm):
    recipe = rewarded(tmp_path, VLLM | {"temperature": 0.7}, ONE_EPOCH)
    run = finetune.train(recipe, tmp_path / "run", reward=shortness)
    asked = [body for path, body in vllm.requests if path == "/v1/completions"]
    steps = [path for path, _ in vllm.requests if path == "/v1/load_lora_adapter"]
    assert len(asked) == 8 and len({body["seed"] // 4 for body in asked}) == 8
    assert len(steps) == stage_of(run)["steps"] > 1
    loaded = [body["lora_name"] for path, body in vllm.requests if path == "/v1/load_lora_adapter"]
    unloaded = [body["lora_name"] for path, body in vllm.requests if path == "/v1/unload_lora_adapter"]
    assert loaded == [f"step-{number + 1}" for number in range(len(steps))] and unloaded == loaded[:-1]
    assert {body["model"] for body in asked} == set(loaded)
    body = asked[0]
    embeddings = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
    table = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").get_input_embeddings().weight
    own = (embeddings[:, None] == table).all(-1).any(-1)
    assert (len(embeddings), int(own.sum())) == (19, 15)  # a picture has 4 places, which are no token's
    assert (body["n"], body["temperature"], body["max_tokens"]) == (4, 0.7, 6)
    (end,) = body["stop_token_ids"]
    assert end == fresh_tokenizer().eos_token_id and all(bias == -100 for bias in body["logit_bias"].values())
    for option in ("--enable-prompt-embeds", "--enable-lora", "processed_logprobs", "127.0.0.1"):
        assert option in vllm.command
    assert vllm.command[vllm.command.index("--max-model-len") + 1] == "25"
    assert all(map(gone, vllm.pids))
    assert [path.name for path in (run.data / "vllm-reward").iterdir()] == ["vllm.log"]
    assert stage_of(run)["figures"]["answer_tokens"] == [2.0] * len(steps)
    assert all(0 <= value <= 3 for value in stage_of(run)["figures"]["correction"])


def test_a_server_that_does_not_start_is_quoted(tmp_path, vllm):
    PretendedVllm(vllm.folder, fails_after=None)
    with pytest.raises(TrainingError, match=r"(?s)status 3.*ValueError: no such thing as this model.*vllm\.log"):
        finetune.train(rewarded(tmp_path, VLLM), tmp_path / "run", reward=shortness)
    assert all(map(gone, vllm.pids))


def test_a_server_that_dies_ends_the_run_which_can_go_on(tmp_path, vllm):
    recipe = rewarded(tmp_path, VLLM | {"iterations": 2}, ONE_EPOCH, train__save_every_n_steps=3)
    PretendedVllm(vllm.folder, fails_after=5)
    with pytest.raises(TrainingError, match=r"(?s)vLLM failed \(completions\).*RuntimeError: out of luck.*resume=True"):
        finetune.train(recipe, tmp_path / "run", reward=shortness)
    assert all(map(gone, vllm.pids))
    before = len(vllm.requests)
    PretendedVllm(vllm.folder)
    run = finetune.train(recipe, tmp_path / "run", resume=True, reward=shortness)
    assert stage_of(run)["steps"] == len(stage_of(run)["losses"]) and len(vllm.requests) > before


def test_a_server_goes_with_its_owner_that_is_killed(tmp_path, vllm):
    script = (
        "import sys, time\n"
        "from finetune.export._check.openai_server import serving\n"
        "with serving('it', [sys.argv[1], '-m', 'server'], 60) as server:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = str(Path(finetune.__file__).parents[1])
    command = [sys.executable, "-c", script, str(vllm.python)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root})
    assert owner.stdout.readline() == b"ready\n"
    assert not any(Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z" for pid in vllm.pids)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert len(vllm.pids) == 2 and all(map(gone, vllm.pids))


def test_a_plan_leaves_the_server_its_share(tmp_path):
    alone = finetune.plan(rewarded(tmp_path), gpu="rtx4090")
    beside = finetune.plan(rewarded(tmp_path, VLLM | {"sampler_memory": 0.25}), gpu="rtx4090")
    assert beside.card.memory == pytest.approx(0.75 * alone.card.memory)
    assert any("vLLM has 25% of the card" in note for note in beside.notes)


def test_what_is_missing_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delenv("FINETUNE_VLLM", raising=False)
    recipe = without_llm(tmp_path, rewarded(tmp_path, VLLM))
    for begin in (finetune.check, lambda recipe: finetune.train(recipe, tmp_path / "run")):
        with pytest.raises(RecipeError, match=r"train.stages.0.objective.sampler: needs vLLM: .*FINETUNE_VLLM"):
            begin(recipe)
    monkeypatch.setenv("FINETUNE_VLLM", sys.executable)
    with pytest.raises(RecipeError, match=r"objective.sampler: .* has no vLLM"):
        finetune.check(recipe)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="vllm is for a training of one process"):
        finetune.check(recipe)


@pytest.mark.parametrize(
    "changes, reason",
    [
        (["adapter.dora=true"], "takes no DoRA"),
        (["adapter.rank=600"], "up to rank 512"),
        (["model.fusion=cross_attention"], "no place for the fusion 'cross_attention'"),
        (["model.llm.trust_remote_code=true", f"model.llm.revision={'a' * 40}"], "the LLM needs code of its own"),
    ],
)
def test_what_vllm_cannot_be_is_refused_by_the_recipe_alone(tmp_path, changes, reason):
    with pytest.raises(RecipeError, match=rf"train.stages.0.objective.sampler: vllm can't sample: .*{reason}"):
        finetune.load_recipe(rewarded(tmp_path, VLLM), changes)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("qwen2_5_vl", "positions have three dimensions"),
        ("gemma3", "attention goes both ways"),
        ("qwen3_vl", "three dimensions"),
    ],
)
def test_a_base_that_needs_more_than_embeddings_is_refused(tmp_path, vllm, name, reason):
    recipe = base_recipe(tmp_path, ZOO[name], family_folder(name, tmp_path / "base"), "image")
    settings = json.loads(recipe.read_text())
    settings["train"]["stages"][0]["objective"] = {"kind": "grpo", "answers": 2, "max_new_tokens": 3, **VLLM}
    recipe.write_text(json.dumps(settings))
    for weights in (tmp_path / "base").rglob("*.safetensors"):
        weights.unlink()
    for begin in (finetune.check, lambda recipe: finetune.train(recipe, tmp_path / "run")):
        with pytest.raises(RecipeError, match=rf"stages.0.objective.sampler: vllm samples from embeddings.*{reason}"):
            begin(recipe)


def logits_of(llm, embeddings):
    with torch.no_grad():
        return llm(inputs_embeds=embeddings).logits


def test_the_llm_alone_with_its_adapter_is_the_llm_that_trains(tmp_path):
    """As plain PEFT and transformers load them, which know nothing of a composite."""
    model = tiny_composite()
    attach(model, Adapter(rank=2, alpha=4.0, targets=["q_proj", "down_proj"], rslora=True))
    shake(model)
    same_llm(model, tmp_path)


@pytest.mark.parametrize("name, quantize", [("llava", "nf4"), ("smolvlm", "none")])
def test_so_is_that_of_a_base(tmp_path, name, quantize):
    recipe = base_recipe(tmp_path, ZOO[name], family_folder(name, tmp_path / "base"), "image")
    settings = json.loads(recipe.read_text())
    settings["model"]["base"] |= {"quantize": quantize}
    recipe.write_text(json.dumps(settings))
    assistant = finetune.load(finetune.train(recipe, tmp_path / "run"))
    shake(assistant.model)
    same_llm(assistant.model, tmp_path, assistant.tokenizer)


def same_llm(model, folder, tokenizer=None):
    alone = LanguageModelAlone(model)
    alone.write(tokenizer or fresh_tokenizer(), folder / "llm")
    alone.write_adapter(folder / "adapter")
    model.eval()
    table = model.get_input_embeddings().weight
    embeddings = table[torch.arange(3, 9)][None].detach() + 0.01
    llm = AutoModelForCausalLM.from_pretrained(folder / "llm").eval()
    assert type(llm).__name__ in dir(transformers)
    expected = logits_of(model.causal_lm, embeddings)
    without = logits_of(llm, embeddings)
    found = logits_of(PeftModel.from_pretrained(llm, folder / "adapter").eval(), embeddings)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert (without - expected).abs().max() > 0.01
