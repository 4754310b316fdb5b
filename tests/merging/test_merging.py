"""LoRA merged module by module, from the LLM's files: the same bits as PEFT's merge of the whole LLM."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_llm
from torch import nn
from transformers import AutoModelForCausalLM

from finetune.common.errors import ArtifactError, MergeRefused, ModelError
from finetune.merging.lora_weights import (
    LoraFile,
    Quantization,
    blocks,
    into_dequantized,
    load_on_disk,
    merged_tensors,
    merged_whole,
    unties,
)
from finetune.merging.merged_folder import Shards
from finetune.model.language_model import load_language_model
from finetune.recipe.schema import Llm

WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128, "head_dim": 16}
SIZES = {
    "llama": WIDE,
    "qwen2": WIDE | {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 64},
    "phi3": {"hidden_size": 64, "intermediate_size": 128},
}
KINDS = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "olora": {"init_lora_weights": "olora"},
}


def llm_folder(folder: Path, family: str, shard: str = "5GB", **changes) -> Path:
    torch.manual_seed(0)
    tiny_llm(family, **(SIZES.get(family, {}) | changes)).save_pretrained(folder, max_shard_size=shard)
    return folder


def loaded(folder: Path, quantize: str = "none") -> Any:
    return load_language_model(Llm(name=str(folder), quantize=quantize), torch.float32)


def left_on_disk(folder: Path, scratch: Path) -> Any:
    return load_on_disk(Llm(name=str(folder)), torch.float32, scratch)


def adapted(folder: Path, quantize: str, path: Path, **how) -> PeftModel:
    """The LLM, under an adapter of chance that is saved at `path`."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=how.pop("targets", "all-linear"), task_type="CAUSAL_LM", **how
    )
    wrapped = get_peft_model(loaded(folder, quantize), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter + 0.05 * torch.randn_like(parameter))
    wrapped.save_pretrained(path, save_embedding_layers=False)
    return wrapped


def streamed(folder: Path, lora: LoraFile | None, dtype, scratch: Path, wrapped=None) -> dict[str, torch.Tensor]:
    quantization = None if wrapped is None else Quantization.of(wrapped.get_base_model())
    return dict(merged_tensors(left_on_disk(folder, scratch), dtype, lora, quantization))


def assert_same_bits(got: dict, whole: nn.Module, tied=()) -> None:
    wanted = {name: tensor for name, tensor in whole.state_dict().items() if name not in tied}
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    ("family", "kind", "shard"),
    [
        *((family, "plain", shard) for family in SIZES for shard in ("5GB", "30KB")),
        *(("gpt2", kind, "30KB") for kind in ("dora", "rslora")),  # PEFT's OLoRA doesn't know transposed weights
        *(("qwen2", kind, "30KB") for kind in ("dora", "rslora", "olora")),
    ],
)
def test_into_the_16_bit_llm(family, kind, shard, tmp_path):
    folder = llm_folder(tmp_path / "llm", family, shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard != "5GB")
    wrapped = adapted(folder, "none", tmp_path / "adapter", **KINDS[kind])
    got = streamed(folder, LoraFile(tmp_path / "adapter"), torch.bfloat16, tmp_path / "scratch")
    whole = merged_whole(wrapped).to(torch.bfloat16)
    assert_same_bits(got, whole, whole.all_tied_weights_keys)


@pytest.mark.parametrize(
    ("family", "kind", "quantize", "dtype"),
    [
        *(("llama", kind, "nf4", torch.bfloat16) for kind in KINDS),
        *((family, "plain", "nf4", torch.float32) for family in ("llama", "qwen2", "phi3")),
        ("llama", "plain", "int8", torch.float32),
    ],
)
def test_into_the_dequantized_llm(family, kind, quantize, dtype, tmp_path):
    folder = llm_folder(tmp_path / "llm", family, "30KB")
    wrapped = adapted(folder, quantize, tmp_path / "adapter", **KINDS[kind])
    got = streamed(folder, LoraFile(tmp_path / "adapter"), dtype, tmp_path / "scratch", wrapped)
    assert_same_bits(got, whole := into_dequantized(wrapped, dtype), whole.all_tied_weights_keys)
    plain = dict(merged_tensors(left_on_disk(folder, tmp_path / "scratch"), dtype))
    changed = {name for name, tensor in got.items() if not torch.equal(tensor, plain[name])}
    assert changed == {name for name in got if "_proj.weight" in name}


def test_a_quantized_gpt2_keeps_its_transposed_weights(tmp_path):
    """bitsandbytes holds Conv1D as a linear layer; what is written is a Conv1D's again, and answers as trained."""
    folder = llm_folder(tmp_path / "llm", "gpt2")
    wrapped = adapted(folder, "nf4", tmp_path / "adapter")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        trained, base = wrapped(ids).logits, loaded(folder)(ids).logits
    got = streamed(folder, LoraFile(tmp_path / "adapter"), torch.float32, tmp_path / "scratch", wrapped)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert not plain.load_state_dict(got, strict=False).unexpected_keys
    plain.tie_weights()
    with torch.no_grad():
        merged = plain.eval()(ids).logits
    torch.testing.assert_close(merged, trained, atol=2e-3, rtol=1e-3)
    assert (merged - base).abs().max() > 0.1


def test_experts_that_transformers_fuses_while_it_loads(tmp_path):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "mixtral",
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        num_local_experts=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llm")
    assert any("experts.3.w2" in name for name in load_file(tmp_path / "llm" / "model.safetensors"))
    wrapped = adapted(tmp_path / "llm", "none", tmp_path / "adapter", targets=["q_proj", "v_proj"])
    got = streamed(tmp_path / "llm", LoraFile(tmp_path / "adapter"), torch.float32, tmp_path / "scratch")
    assert_same_bits(got, merged_whole(wrapped))


def test_adapted_embeddings_leave_the_head_that_they_were_tied_to(tmp_path):
    folder = llm_folder(tmp_path / "llm", "qwen2")
    wrapped = adapted(folder, "none", tmp_path / "adapter", targets=["embed_tokens", "q_proj"])
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        trained = wrapped(ids).logits
    lora = LoraFile(tmp_path / "adapter")
    base = left_on_disk(folder, tmp_path / "scratch")
    got = dict(merged_tensors(base, torch.float32, lora))
    assert unties(base, lora) and not torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
    plain = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    plain.load_state_dict(got)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(ids).logits, trained, atol=1e-4, rtol=1e-4)


def test_a_closed_form(tmp_path):
    """W + alpha / rank * B A, of one weight, by hand."""
    folder = llm_folder(tmp_path / "llm", "llama")
    adapted(folder, "none", tmp_path / "adapter")
    got = streamed(folder, LoraFile(tmp_path / "adapter"), torch.float32, tmp_path / "scratch")
    lora = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a, b = (lora[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    base = load_file(folder / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(got[f"{name}.weight"], base + 8 / 4 * b @ a)


def test_an_initialisation_by_chance_is_left_to_the_whole_llm(tmp_path):
    folder = llm_folder(tmp_path / "llm", "llama")
    for name, by_module in (("pissa", True), ("pissa_niter_4", False), ("gaussian", True)):
        adapted(folder, "none", tmp_path / name, init_lora_weights=name)
        assert LoraFile(tmp_path / name).by_module is by_module, name


def test_an_adapter_for_another_llm_names_what_is_missing(tmp_path):
    folder = llm_folder(tmp_path / "llm", "llama")
    adapted(llm_folder(tmp_path / "other", "llama", num_hidden_layers=3), "none", tmp_path / "adapter")
    with pytest.raises(ArtifactError, match=r"14 of the 21 modules .*Trained: model.layers.2.mlp.down_proj"):
        streamed(folder, LoraFile(tmp_path / "adapter"), torch.float32, tmp_path / "scratch")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    folder = llm_folder(tmp_path / "llm", "llama")
    wrapped = adapted(folder, "none", tmp_path / "adapter")
    next(p for n, p in wrapped.named_parameters() if "layers.1.self_attn.q_proj.lora_B" in n).data[0, 0] = float("nan")
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(MergeRefused, match=r"model.layers.1.self_attn.q_proj: .*aren't finite"):
        streamed(folder, LoraFile(tmp_path / "adapter"), torch.float32, tmp_path / "scratch")


def test_merged_whole_such_weights_are_refused_too(tmp_path):
    wrapped = adapted(llm_folder(tmp_path / "llm", "llama"), "none", tmp_path / "adapter")
    next(p for n, p in wrapped.named_parameters() if "lora_B" in n).data[0, 0] = float("inf")
    with pytest.raises(MergeRefused, match=r"^the LLM: merging gives weights that aren't finite"):
        merged_whole(wrapped)


def test_an_llm_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"LLM '.*/nowhere'"):
        left_on_disk(tmp_path / "nowhere", tmp_path / "scratch")


def test_blocks_are_the_outermost_modules_with_weights_of_their_own():
    inner = nn.ModuleDict({"linear": nn.Linear(2, 2), "nothing": nn.ReLU()})
    module = nn.ModuleDict({"inner": inner, "norm": nn.LayerNorm(2)})
    assert blocks(module) == ["inner.linear", "norm"]
    module.inner.own = nn.Parameter(torch.zeros(1))
    assert blocks(module) == ["inner", "norm"]
    assert blocks(nn.Linear(2, 2)) == [""] and blocks(nn.ReLU()) == []


def test_the_tensors_of_a_module_are_found_by_its_name_alone(tmp_path):
    adapted(llm_folder(tmp_path / "llm", "llama"), "none", tmp_path / "adapter")
    lora = LoraFile(tmp_path / "adapter")
    content = load_file(lora.path)
    assert sum(map(len, lora.tensors.values())) == len(content) and len(lora.tensors) == 14
    module = "model.layers.1.mlp.up_proj"
    assert sorted(lora.tensors[module]) == [f"base_model.model.leaf.lora_{part}.weight" for part in "AB"]
    for name, tensor in lora.tensors[module].items():
        assert torch.equal(tensor, content[name.replace("leaf", module)])
    llm = tiny_llm("llama", **SIZES["llama"])
    assert lora.modules_of(llm) == {name: name for name in lora.tensors}
    assert not unties(llm, lora) and not unties(llm, None)


def test_without_an_adapter_the_llm_is_written_as_it_is(tmp_path):
    folder = llm_folder(tmp_path / "llm", "qwen2")
    got = streamed(folder, None, torch.float32, tmp_path / "scratch")
    assert_same_bits(got, whole := loaded(folder), whole.all_tied_weights_keys)
    assert all(
        not tensor.requires_grad and tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in got.values()
    )


def test_the_modules_that_are_quantized_are_named_as_without_an_adapter(tmp_path):
    folder = llm_folder(tmp_path / "llm", "llama")
    wrapped = adapted(folder, "nf4", tmp_path / "adapter", targets=["q_proj"])
    found = Quantization.of(wrapped.get_base_model())
    plain = loaded(folder)
    linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert found.modules == linear - {"lm_head"} and found.config.load_in_4bit
    assert Quantization.of(plain) == Quantization(None, frozenset())


@pytest.mark.parametrize("damage", [b"", b"\x00" * 50, None])
def test_a_damaged_adapter_file_is_named(damage, tmp_path):
    adapted(llm_folder(tmp_path / "llm", "llama"), "none", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors is damaged"):
        LoraFile(tmp_path / "adapter")
    path.unlink()
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors is missing"):
        LoraFile(tmp_path / "adapter")


def test_shards_are_named_as_transformers_names_them(tmp_path):
    tensors = {f"t{number}": torch.full((10,), float(number)) for number in range(5)}
    for limit, files in ((1000, 1), (80, 3), (1, 5)):
        folder = tmp_path / str(limit)
        folder.mkdir()
        shards = Shards(folder, limit)
        for name, tensor in tensors.items():
            shards.add(name, tensor)
        shards.close()
        found = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
        names = sorted(path.name for path in folder.iterdir())
        if files == 1:
            assert names == ["model.safetensors"]
        else:
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            assert sorted(set(index["weight_map"].values())) == names[:-1]
            assert names[0] == f"model-00001-of-{files:05d}.safetensors" and len(names) == files + 1
            assert index["metadata"]["total_size"] == 200


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_shards(tmp_path):
    """An LLM of 100 MB in files of 10: merging it takes a file that is read, one that is written, and a few modules."""
    benchmark = Path(__file__).parents[2] / "benchmarks" / "merge_memory.py"
    make = runpy.run_path(str(benchmark))["make"]
    make(tmp_path / "tiny", 1, 64, 10**7)
    make(tmp_path / "large", 12, 512, 10**7)
    command = [sys.executable, str(benchmark), "--folder", str(tmp_path), "--shard", "10", "--merge"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["files"] > 100 and found["added"] < 70
