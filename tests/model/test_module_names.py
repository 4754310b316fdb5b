"""Adapters load on the LLM that they were trained on, and on no other."""

import json

import pytest
from saved_adapter import SAVED, saved_adapter
from tiny import tiny_llm, tiny_llm_folder

import finetune
from finetune.common.errors import ArtifactError
from finetune.model import adapter, module_names
from finetune.model import load as loading


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
    monkeypatch.setattr(loading, "load_llm", lambda components: rename(load(components)))


def test_modules_that_were_renamed_are_an_error_with_names_of_both_sides(renaming, tmp_path):
    with pytest.raises(ArtifactError, match=r"4 of the 14 modules|6 of the 14 modules") as error:
        finetune.load(saved_adapter(tmp_path))
    assert "model.layers.0.mlp.down_proj" in str(error.value) and "feed_forward" in str(error.value)


def test_no_module_at_all_is_an_error_with_both_sides(tmp_path):
    with pytest.raises(ArtifactError, match="none of the 14 modules") as error:
        adapter.fitted_adapter(saved_adapter(tmp_path), tiny_llm("gpt2"))
    assert "model.layers.0.mlp.down_proj" in str(error.value) and "transformer.h.0.attn.c_attn" in str(error.value)


def test_an_llm_of_other_sizes_is_refused_with_both_sizes(tmp_path):
    folder = saved_adapter(tmp_path)
    other = tiny_llm_folder(tmp_path / "other", hidden_size=64)
    path = folder / "multimodal.json"
    content = json.loads(path.read_text())
    content["model"]["llm"]["name"] = str(other)
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"another LLM.*takes (32|48) features.*takes (64|128)"):
        finetune.load(folder)


def test_what_transformers_renames_itself_is_asked_of_it():
    """ViTMAE's attention was renamed between versions: its own table of older checkpoints tells."""
    import transformers

    config = transformers.ViTMAEConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = transformers.ViTMAEForPreTraining(config)
    names = {name for name, _ in model.named_modules()}
    then, now = "decoder.decoder_layers.0.attention.attention.query", "decoder.decoder_layers.0.attention.q_proj"
    assert now in names and module_names.renamed([then], names, model) == {then: now}


def test_the_manifest_describes_the_modules_that_have_lora():
    content = json.loads((SAVED / "multimodal.json").read_text())["modules"]
    assert content["llm_class"] == "LlamaForCausalLM" and len(content["shapes"]) == 14
    assert content["shapes"]["model.layers.1.mlp.down_proj"] == [48, 32]
    assert content["shapes"].keys() == {
        f"model.layers.{layer}.{module}"
        for layer in range(2)
        for module in (
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
    }
