"""LoRA that is computed at once beside PEFT's own layers: losses, gradients, and when it is left to PEFT."""

import copy
from contextlib import nullcontext

import pytest
import torch
from packed import shake
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llm, tiny_llm_folder

from finetune.model import fused_lora
from finetune.model.language_model import load_language_model, without_adapter
from finetune.recipe.schema import Llm

IDS = torch.tensor([[5, 9, 30, 7, 61, 12, 40], [8, 3, 22, 91, 17, 33, 2]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llm_folder(tmp_path_factory.mktemp("fused") / "llm", hidden_size=64, intermediate_size=96)


@pytest.fixture
def calls(monkeypatch):
    """How often LoRA was computed at once."""
    made, apply = [], fused_lora._LinearWithLora.apply
    monkeypatch.setattr(fused_lora._LinearWithLora, "apply", lambda *args: made.append(args) or apply(*args))
    return made


def pair_of(language_model, dropout=0.0, **options):
    """The same LLM and adapter, by PEFT alone and at once."""
    pair = []
    for fused in (False, True):
        config = LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, target_modules="all-linear", **options)
        llm = copy.deepcopy(language_model)
        if fused:
            fused_lora.fuse(config, llm)
        torch.manual_seed(4)
        model = get_peft_model(llm, config)
        shake(model)
        pair.append(model.train())
    return pair


def gradients_of(model, autocast=False):
    """The loss, and the gradients of LoRA's weights and of the embeddings that the LLM reads."""
    torch.manual_seed(7)  # of dropout
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        logits = model(inputs_embeds=embeddings, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), {**gradients, "embeddings": embeddings.grad}


def distances(one, other):
    assert one.keys() == other.keys() and len(one) == 1 + 2 * 14  # 7 layers of 2 blocks, A and B
    assert all(float(gradient.abs().max()) > 0 for gradient in one.values())
    return {name: float((one[name] - other[name]).norm() / one[name].norm()) for name in one}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_losses_and_gradients_are_peft_s(folder, quantize, dropout, calls):
    plain, fused = pair_of(load_language_model(Llm(name=str(folder), quantize=quantize), torch.float32), dropout)
    (loss, gradients), (same, others) = gradients_of(plain), gradients_of(fused)
    assert len(calls) == 14
    assert same == pytest.approx(loss, rel=1e-6)
    assert max(distances(gradients, others).values()) < 1e-5
    for module in fused.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 1.01
    assert max(distances(gradients, gradients_of(fused)[1]).values()) > 1e-3  # what the bound would notice


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_in_half_precision_they_are_as_near_as_rounding_lets_them(folder, quantize, calls):
    llm = load_language_model(Llm(name=str(folder), quantize=quantize), torch.bfloat16)
    plain, fused = pair_of(llm)
    (loss, gradients), (same, others) = gradients_of(plain, autocast=True), gradients_of(fused, autocast=True)
    assert len(calls) == 14
    assert same == pytest.approx(loss, rel=0.01)
    assert max(distances(gradients, others).values()) < 0.05
    assert all(others[name].dtype == gradient.dtype for name, gradient in gradients.items())


def test_activation_checkpoints_compute_the_same_gradients(folder, calls):
    _, fused = pair_of(load_language_model(Llm(name=str(folder), quantize="nf4"), torch.float32), 0.3)
    loss, gradients = gradients_of(fused)
    fused.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    same, others = gradients_of(fused)
    assert len(calls) == 3 * 14 and same == loss
    assert max(distances(gradients, others).values()) == 0


def test_what_only_lora_learns_from_is_not_kept_where_it_stands_still():
    """As while the projectors are aligned: bytes kept for the backward pass."""
    _, fused = pair_of(tiny_llm())
    kept = []
    for learns in (True, False):
        for name, parameter in fused.named_parameters():
            parameter.requires_grad_(learns and "lora_" in name)
        sizes = {}
        embeddings = fused.get_input_embeddings()(IDS).detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.setdefault(tensor.data_ptr(), tensor.nbytes) and tensor,
            lambda tensor: tensor,
        ):
            logits = fused(inputs_embeds=embeddings, use_cache=False).logits
        logits.square().mean().backward()
        assert embeddings.grad.abs().max() > 0
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.9 * kept[0]


def test_less_is_kept_and_copied_than_by_peft():
    """Bytes of tensors made in a step, in both directions."""
    plain, fused = pair_of(tiny_llm(hidden_size=64))
    made = []
    for model in (plain, fused):
        with torch.profiler.profile(profile_memory=True) as profile:
            gradients_of(model)
        made.append(sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages()))
    assert made[1] < 0.95 * made[0]


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_not_plain_lora_is_left_to_peft(options, calls):
    plain, fused = pair_of(tiny_llm(), **options)
    (loss, _), (same, _) = gradients_of(plain), gradients_of(fused)
    assert same == loss and not calls


def test_answers_and_a_teacher_without_the_adapter_are_left_to_peft(calls):
    bare = tiny_llm()
    plain, fused = pair_of(bare)
    with torch.no_grad():
        assert torch.equal(fused(IDS).logits, plain(IDS).logits)
    with without_adapter(fused):
        assert torch.equal(fused(IDS).logits, bare(IDS).logits)
    assert not calls


def test_a_layer_in_8_bits_beside_the_adapter_is_peft_s_own(folder):
    llm = load_language_model(Llm(name=str(folder), quantize="int8"), torch.float32)
    config = LoraConfig(r=3, target_modules="all-linear")
    fused_lora.fuse(config, llm)
    kinds = {type(module).__name__ for module in get_peft_model(llm, config).modules() if hasattr(module, "lora_A")}
    assert kinds == {"Linear8bitLt"}


def test_the_saved_adapter_is_plain_peft_s(folder, tmp_path):
    plain, fused = pair_of(tiny_llm())
    fused.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(plain.unload()), tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS).logits, fused.eval()(IDS).logits)
