import copy
import json
import re

import pytest
import torch
import transformers
from packed import shake
from peft import PeftModel
from safetensors.torch import load_file, save_file
from saved_adapter import SAVED
from tiny import VOCABULARY, part, tiny_composite, tiny_llm_folder, tiny_tokenizer

from finetune.common.errors import ArtifactError, ModelError
from finetune.model.adapter import (
    attach,
    fitted_adapter,
    load_trained,
    save_adapter_folder,
    save_trained,
    saved_adapter,
)
from finetune.model.compose import compose
from finetune.model.language_model import load_language_model
from finetune.model.manifest import AdapterManifest
from finetune.recipe.schema import Adapter, Llm

KINDS = [
    {},
    {"rslora": True},
    {"dora": True},
    {"initialization": "pissa"},
    {"targets": ["q_proj", "down_proj"]},
    {"targets": ["embed_tokens"]},
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


def composite_with(**kind):
    torch.manual_seed(0)
    model = tiny_composite()
    bare = copy.deepcopy(model.causal_lm)
    attach(model, Adapter(rank=4, alpha=8.0, **kind))
    return model.eval(), bare


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits


@kinds
def test_a_new_adapter_changes_nothing(kind):
    model, bare = composite_with(**kind)
    torch.testing.assert_close(logits_of(model), logits_of(bare), atol=1e-4, rtol=0)


@kinds
def test_a_saved_adapter_comes_back_through_our_loader_and_plain_peft(kind, tmp_path):
    model, bare = composite_with(**kind)
    shake(model)
    save_trained(model, tmp_path)
    other = tiny_composite()
    other.load_state_dict(
        {k: v for k, v in composite_with()[0].state_dict().items() if "projectors" in k}, strict=False
    )
    other.language_model = copy.deepcopy(bare)
    attach(other, saved_adapter(tmp_path))
    load_trained(other, tmp_path)
    assert torch.equal(logits_of(other.eval()), logits_of(model))
    if "initialization" not in kind:  # PiSSA's base isn't the plain one
        plain = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
        torch.testing.assert_close(logits_of(plain), logits_of(model), atol=1e-5, rtol=0)


def test_lora_lands_on_the_llm_alone_and_not_on_its_head():
    model, _ = composite_with()
    layers = {name.rpartition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    kinds = {name.rpartition(".")[2] for name in layers}
    assert all(name.startswith("language_model.") for name in layers)
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(layers) == 2 * len(kinds)


def test_targets_that_are_not_there_are_a_model_error():
    with pytest.raises(ModelError, match="no_such_module"):
        attach(tiny_composite(), Adapter(rank=2, alpha=4.0, targets=["no_such_module"]))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "projectors.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "renamed", "one less", "reshaped"])
def test_a_file_that_does_not_fit_is_named_and_nothing_is_half_loaded(file, damage, tmp_path):
    model, _ = composite_with()
    shake(model)
    save_trained(model, tmp_path)
    tensors = load_file(tmp_path / file)
    first = next(iter(tensors))
    if damage == "renamed":
        tensors = {f"x.{name}": tensor for name, tensor in tensors.items()}
    elif damage == "one less":
        del tensors[first]
    elif damage == "reshaped":
        tensors[first] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / file)
    if damage == "missing":
        (tmp_path / file).unlink()
    before = {name: p.detach().clone() for name, p in model.projectors.named_parameters()}
    with pytest.raises(ArtifactError, match=file):
        load_trained(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.projectors.named_parameters())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("double_quantize", [True, False])
def test_a_4_bit_llm_answers_as_it_is_trained(dora, double_quantize, tmp_path):
    """On CPUs with AVX-512 BF16, bitsandbytes lays weights out anew in the first forward without gradients."""
    section = Llm(name=str(tiny_llm_folder(tmp_path)), quantize="nf4", double_quantize=double_quantize)
    llm = load_language_model(section, torch.float32)
    model = compose(llm, encoders={}, projectors={}, fusion=part("fusion", "prefix"), placeholder_ids={})
    attach(model, Adapter(rank=4, alpha=8.0, dora=dora))
    shake(model.eval())
    ids = torch.randint(3, VOCABULARY, (1, 12))
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    trained = model.causal_lm(inputs_embeds=embeddings).logits.detach()
    for _ in range(2):
        assert (logits_of_ids(model, ids) - trained).norm() < 0.03 * trained.norm()


def logits_of_ids(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_the_recipes_settings_are_pefts_and_come_back_from_the_folder(tmp_path):
    settings = Adapter(rank=3, alpha=5.0, dropout=0.25, targets=["k_proj", "q_proj"], rslora=True, dora=True)
    for number, adapter in enumerate([settings, Adapter(rank=2, alpha=4.0, initialization="olora")]):
        model = tiny_composite()
        attach(model, adapter)
        config = model.language_model.peft_config["default"]
        assert (config.r, config.lora_alpha, config.lora_dropout) == (adapter.rank, adapter.alpha, adapter.dropout)
        assert (config.use_rslora, config.use_dora, config.task_type) == (adapter.rslora, adapter.dora, "CAUSAL_LM")
        assert config.init_lora_weights == (True if adapter.initialization == "default" else adapter.initialization)
        save_trained(model, tmp_path / str(number))
        again = saved_adapter(tmp_path / str(number))
        if isinstance(adapter.targets, list):
            again = again.model_copy(update={"targets": sorted(again.targets)})
            assert again == adapter
        else:
            assert again.model_copy(update={"targets": adapter.targets}) == adapter
            assert {name.rpartition(".")[2] for name in again.targets} >= {"q_proj", "down_proj"}


def test_a_folder_without_lora_has_no_adapter(tmp_path):
    assert saved_adapter(tmp_path) is None
    assert fitted_adapter(tmp_path, None) is None


def test_the_output_head_is_no_target():
    with pytest.raises(ModelError, match=r"adapter.targets: the output head can't be one"):
        attach(tiny_composite(), Adapter(rank=2, alpha=4.0, targets=["q_proj", "lm_head"]))


def test_peft_s_refusal_is_one_line():
    with pytest.raises(ModelError, match=r"^adapter: PEFT refuses it: ") as caught:
        attach(tiny_composite(), Adapter(rank=2, alpha=4.0, targets=["no_such_module"]))
    assert "\n" not in str(caught.value)


def test_a_folder_holds_every_trained_part_and_no_card(tmp_path):
    model = tiny_composite(fusion="cross_attention")
    attach(model, Adapter(rank=4, alpha=8.0))
    model.heads["mood"] = torch.nn.Linear(4, 3)
    model.tuned["image"] = [name for name, _ in model.encoders["image"].named_parameters()][:2]
    shake(model)
    save_trained(model, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    files = {"adapter_config.json", "adapter_model.safetensors", "projectors.safetensors"}
    assert {path.name for path in folder.iterdir()} == files
    content = load_file(folder / "projectors.safetensors")
    parts = {"projectors": model.projectors, "fusion": model.fusion, "heads": model.heads}
    expected = {f"{role}.{name}": t for role, part in parts.items() for name, t in part.state_dict().items()}
    expected |= {f"encoders.image.{name}": model.encoders["image"].get_parameter(name) for name in model.tuned["image"]}
    assert content.keys() == expected.keys()
    assert all(torch.equal(content[name], tensor) for name, tensor in expected.items())
    before = {name: tensor.clone() for name, tensor in expected.items()}
    with torch.no_grad():
        for tensor in expected.values():
            tensor.zero_()
    load_trained(model, folder)
    assert all(torch.equal(before[name], tensor) for name, tensor in expected.items())
    model.tuned.clear()  # a model that is given features holds no encoder
    load_trained(model, folder)


def test_what_does_not_fit_is_counted_and_told_by_name_and_shape(tmp_path):
    model, _ = composite_with()
    save_trained(model, tmp_path)
    path = tmp_path / "projectors.safetensors"
    content = load_file(path)
    names = sorted(content)
    save_file({**content, names[0]: torch.zeros(3, 3)}, path)
    shape = re.escape(f"{tuple(content[names[0]].shape)}")
    words = rf"{len(names) - 1} of {len(names)} tensors match; other shape: {names[0]} \(3, 3\) instead of {shape}$"
    with pytest.raises(ArtifactError, match=words):
        load_trained(model, tmp_path)
    other = {f"projectors.image.other.{number}": torch.zeros(1) for number in range(2)}
    save_file({**{name: content[name] for name in names[1:]}, **other}, path)
    words = rf"only in the model: {names[0]} ...; only in the file: projectors.image.other.0 ...$"
    with pytest.raises(ArtifactError, match=words):
        load_trained(model, tmp_path)


def test_a_published_folder_names_the_llm_as_its_manifest_does(tmp_path):
    """Not by a path of the machine that trained it."""
    model, _ = composite_with()
    manifest = AdapterManifest.read(SAVED)
    llm = manifest.model.llm.model_copy(update={"name": "org/llm", "revision": "c" * 40})
    manifest = manifest.model_copy(update={"model": manifest.model.model_copy(update={"llm": llm}), "seed": 5})
    save_adapter_folder(model, tiny_tokenizer(), tmp_path, manifest)
    assert AdapterManifest.read(tmp_path) == manifest
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"], config["r"]) == ("org/llm", "c" * 40, 4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("a red square")["input_ids"] == tiny_tokenizer()("a red square")["input_ids"]
    load_trained(model, tmp_path)
    bare = tmp_path / "without LoRA"
    save_adapter_folder(tiny_composite(), tiny_tokenizer(), bare, manifest)
    assert AdapterManifest.read(bare) == manifest and not (bare / "adapter_config.json").exists()
