"""Adapters load on the LLM that they were trained on, and on no other."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
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


def test_sizes_are_those_of_layers_that_can_have_lora():
    model = torch.nn.ModuleDict(
        {
            "linear": torch.nn.Linear(3, 5),
            "embedding": torch.nn.Embedding(11, 7),
            "transposed": transformers.Conv1D(5, 3),
            "norm": torch.nn.LayerNorm(4),
        }
    )
    shapes = module_names.ModuleShapes(
        llm_class="Other", shapes={"linear": (3, 5), "embedding": (11, 7), "transposed": (3, 5)}
    )
    assert module_names.names_in(shapes, "here", model) == {name: name for name in shapes.shapes}
    with pytest.raises(ArtifactError, match="here: the adapter doesn't fit the LLM: 1 of the 2 modules") as caught:
        module_names.names_in(
            module_names.ModuleShapes(llm_class="Other", shapes={"linear": (3, 5), "norm": (4, 4)}), "here", model
        )
    assert "are in this ModuleDict. Trained: norm; in the model: embedding, transposed. " in str(caught.value)
    for size in ((4, 5), (3, 6)):
        shapes = module_names.ModuleShapes(llm_class="Other", shapes={"linear": size})
        with pytest.raises(ArtifactError) as caught:
            module_names.names_in(shapes, "here", model)
        assert str(caught.value) == (
            f"here: the adapter was trained on another LLM: in that Other linear takes {size[0]} features and gives "
            f"{size[1]}, in this ModuleDict it takes 3 and gives 5"
        )


def test_three_names_of_each_side_are_shown():
    with pytest.raises(ArtifactError) as caught:
        module_names.matched("x", ["a", *"fedc"], ["a", *"zyx"], torch.nn.Linear(1, 1))
    words = "x: 1 of the 5 modules that were trained are in this Linear. Trained: c, d, e, ...; in the model: x, y, z. "
    assert str(caught.value).startswith(words)
    with pytest.raises(ArtifactError, match=r"x: none of the 1 modules .*Trained: b; in the model: no others. "):
        module_names.matched("x", ["b"], [], torch.nn.Linear(1, 1))
    assert module_names.matched("x", ["b"], ["a", "b"], torch.nn.Linear(1, 1)) == {"b": "b"}


def test_tensors_of_an_adapter_are_of_modules():
    names = [f"base_model.model.model.layers.{n}.q_proj.lora_{part}.weight" for n in (1, 0) for part in "AB"]
    assert module_names.modules(names) == ["model.layers.1.q_proj", "model.layers.0.q_proj"]
    assert [module_names.is_lora(name) for name in (names[0], "model.lora.weight")] == [True, False]


def test_a_file_of_tensors_is_read_or_named(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ArtifactError, match=r"x.safetensors is missing: train again"):
        module_names.tensors(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ArtifactError, match=r"x.safetensors is damaged \(.*\): train again"):
        module_names.tensors(path)


def test_the_shapes_of_an_llm_are_of_its_modules_with_lora():
    llm = tiny_llm()
    wrapped = get_peft_model(llm, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    shapes = module_names.module_shapes(wrapped.get_base_model())
    queries = {f"model.layers.{layer}.self_attn.q_proj": (32, 32) for layer in range(2)}
    assert shapes.llm_class == "LlamaForCausalLM"
    assert queries.items() <= shapes.shapes.items() and "lm_head" not in shapes.shapes
    assert shapes.shapes["model.embed_tokens"] == (128, 32) and len(shapes.shapes) == 3
