"""Adapters stay loadable when transformers renames modules, and only on the LLM that they were trained on."""

import json

import pytest
import torch
from fixture_folders import BASE, expected_of, fixture_folder
from tiny import tiny_llm, tiny_llm_folder

import finetune
from finetune.common.errors import ArtifactError
from finetune.model import adapter
from finetune.model import load as loading
from finetune.model import module_names as key_map

RENAMED = ((r"\bq_proj\b", "query", "99.0"), (r"\bmlp\b", "feed_forward", "99.1"))


def rename(llm):
    """An LLM whose class calls its modules otherwise, as another version of transformers would."""
    for layer in llm.model.layers:
        attention = layer.self_attn
        attention.query = attention._modules.pop("q_proj")
        type(attention).q_proj = property(lambda self: self._modules.get("q_proj") or self._modules["query"])
        layer.feed_forward = layer._modules.pop("mlp")
        type(layer).mlp = property(lambda self: self._modules.get("mlp") or self._modules["feed_forward"])
    return llm


@pytest.fixture
def renaming(monkeypatch):
    """`finetune.load` finds an LLM with other names."""
    from transformers.models.llama import modeling_llama

    for name in ("LlamaAttention", "LlamaDecoderLayer"):  # properties of these tests alone
        monkeypatch.setattr(modeling_llama, name, type(name, (getattr(modeling_llama, name),), {}))
    load = loading.load_llm
    monkeypatch.setattr(loading, "load_llm", lambda parts, llm: rename(load(parts, llm)))


@pytest.mark.parametrize("name", ["format-2", "format-3", "format-4"])
def test_an_adapter_finds_its_modules_under_their_new_names(name, renaming, monkeypatch, tmp_path):
    monkeypatch.setattr(key_map, "RENAMES", RENAMED)
    model = finetune.load(fixture_folder(name, tmp_path)).model
    names = {name for name, _ in model.named_parameters() if ".lora_A" in name and name.startswith("language_model")}
    assert any(".query." in name for name in names) and not any(".q_proj." in name for name in names)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, 8, 9, 10]])).logits[0, -1, :16]
    torch.testing.assert_close(logits, torch.tensor(expected_of(name)["logits"]), atol=1e-4, rtol=0)


def test_without_the_line_the_names_of_both_sides_are_told(renaming, tmp_path):
    with pytest.raises(ArtifactError, match=r"4 of the 14 modules|6 of the 14 modules") as told:
        finetune.load(fixture_folder("format-4", tmp_path))
    assert "model.layers.0.mlp.down_proj" in str(told.value) and "feed_forward" in str(told.value)


def test_no_module_at_all_is_an_error_with_both_sides(tmp_path):
    with pytest.raises(ArtifactError, match="none of the 14 modules") as told:
        adapter.options_for(fixture_folder("format-3", tmp_path), tiny_llm("gpt2"))
    assert "model.layers.0.mlp.down_proj" in str(told.value) and "transformer.h.0.attn.c_attn" in str(told.value)


@pytest.mark.parametrize("name", ["format-2", "format-4"])
def test_an_llm_of_other_sizes_is_told_by_both_sizes(name, tmp_path):
    folder = fixture_folder(name, tmp_path)
    other = tiny_llm_folder(tmp_path / "other", hidden_size=64)
    path = folder / "multimodal.json"
    content = json.loads(path.read_text())
    content["language_model"]["name"] = str(other)
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"another LLM.*takes (32|48) numbers.*takes (64|128)"):
        finetune.load(folder)


def test_what_transformers_renames_itself_is_asked_of_it():
    """ViTMAE's attention was renamed between versions: its own table of older checkpoints tells."""
    import transformers

    config = transformers.ViTMAEConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = transformers.ViTMAEForPreTraining(config)
    own = {name for name, _ in model.named_modules()}
    then, now = "decoder.decoder_layers.0.attention.attention.query", "decoder.decoder_layers.0.attention.q_proj"
    assert now in own and key_map.renamed([then], own, model) == {then: now}


def test_equal_names_come_first_and_no_name_is_taken_twice(monkeypatch):
    monkeypatch.setattr(key_map, "RENAMES", ((r"^a$", "b", "99.0"), (r"^c$", "d", "99.0")))
    llm = tiny_llm()
    assert key_map.renamed(["a", "b", "c"], ["b", "d", "e"], llm) == {"b": "b", "c": "d"}


def test_what_is_saved_describes_what_lora_hangs_on():
    content = json.loads((BASE.parent / "format-4" / "multimodal.json").read_text())["modules"]
    assert content["class"] == "LlamaForCausalLM" and len(content["shapes"]) == 14
    assert content["shapes"]["model.layers.1.mlp.down_proj"] == [48, 32]
    assert content["shapes"].keys() == {
        f"model.layers.{layer}.{module}"
        for layer in range(2)
        for module in (
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
    }
