"""nf4 weights that are dequantized once train as those that are dequantized in every step, and nobody sees it later."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from tiny import tiny_llm_folder, tiny_recipe

from finetune.common.errors import ModelError, RecipeError
from finetune.common.gpu import GIB
from finetune.merging.merge import merge
from finetune.model.language_model import dequantized, load_language_model
from finetune.model.manifest import AdapterManifest
from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.schema import Llm
from finetune.training import shared
from finetune.training.plan.plan import plan
from finetune.training.train import train

TUNE = {"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 1.0e-3}


def recipe_in(folder: Path, once: bool, **changes: object) -> Recipe:
    llm = {"name": str(folder / "llm"), "quantize": "nf4"}
    return load_recipe(
        tiny_recipe(folder, model__llm=llm, train__dequantize_once=once, train__stages=[TUNE], **changes)
    )


def test_losses_and_adapter_are_those_of_nf4(tmp_path, monkeypatch):
    seen = []

    def watched(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
        result = dequantized(model, dtype)
        seen.append([type(module) for module in result.modules() if isinstance(module, torch.nn.Linear)])
        return result

    monkeypatch.setattr(shared, "dequantized", watched)
    runs = [train(recipe_in(tmp_path, once), tmp_path / f"run{once}") for once in (False, True)]
    assert len(seen) == 1 and len(seen[0]) > 10 and Linear4bit not in seen[0]
    plain, once = (run.read_metrics()["train"]["stages"]["tune"]["losses"] for run in runs)
    assert len(plain) >= 3 and once == pytest.approx(plain, rel=1e-5)
    for file in ("adapter_model.safetensors", "projectors.safetensors"):
        before, after = (load_file(run.adapter / file) for run in runs)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.allclose(after[name], tensor, rtol=1e-3, atol=1e-5), name
    assert AdapterManifest.read(runs[1].adapter).model.llm.quantize == "nf4"
    certificates = [merge(run) for run in runs]
    assert [one.dtypes.llm for one in certificates] == ["nf4", "nf4"]
    assert certificates[1].saved.kl == pytest.approx(certificates[0].saved.kl, rel=0.05, abs=1e-6)


def test_weights_that_memory_has_no_room_for_are_refused(tmp_path, monkeypatch):
    model = load_language_model(Llm(name=str(tiny_llm_folder(tmp_path / "llm"))), torch.float32)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    needed = 4 * sum(layer.in_features * layer.out_features for layer in layers)
    for free in (needed, 2 * GIB):
        memory = SimpleNamespace(available=free)
        monkeypatch.setattr("finetune.model.language_model.psutil.virtual_memory", lambda memory=memory: memory)
        if free == needed:
            with pytest.raises(
                ModelError, match=r"dequantize_once: .* 0.0 GiB in float32, and may take 75% of the 0.0 GiB"
            ):
                dequantized(model, torch.float32)
        else:
            assert not any(p.requires_grad for p in dequantized(model, torch.float32).parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.llm.quantize=int8", "is for an LLM in nf4"),
        ("adapter.initialization=olora", "is for LoRA that begins with zeros"),
    ],
)
def test_where_it_is_for_nothing_it_is_refused(change, said, tmp_path):
    with pytest.raises(RecipeError, match=f"train.dequantize_once: {said}"):
        recipe_in(tmp_path, True).with_(change)


def test_a_plan_counts_the_weights_in_16_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.training.plan.plan.SIZES", (0.517,))
    plain, once = (plan(recipe_in(tmp_path, once), "t4", advise=once) for once in (False, True))
    weights = [next(p for p in one.phases if p.name == "train tune").parts["language_model"] for one in (plain, once)]
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # of two layers
    assert weights[1] - weights[0] == pytest.approx(1.4 * linear, rel=0.1)  # 2 bytes a weight, and not 0.5 with scales
    assert once.changes[0].keys == {"train.dequantize_once": False} and once.changes[0].needed == plain.needed
