"""Liger's kernels: asked for where they run, for the LLM's layers alone, and named where they are missing."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny import tiny_composite, tiny_recipe

from finetune.commands.check import check
from finetune.common.errors import RecipeError
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Train
from finetune.training import liger
from finetune.training.train import set_up

STAGE = {"name": "tune", "trains": ["adapter"], "learning_rate": 1.0e-3}


@pytest.fixture
def asked(monkeypatch):
    """What transformers is asked for, with a package that has kernels for LLaMA."""
    calls: list[tuple[object, dict[str, bool]]] = []
    package = ModuleType("liger_kernel.transformers.monkey_patch")
    package.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(liger, "apply_liger_kernel", lambda *given: calls.append(given))
    return calls


def llm(family: str = "llama", device: str = "cuda") -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), config=SimpleNamespace(model_type=family))


def test_only_layers_are_replaced(asked):
    given = llm()
    liger.use_liger(given)
    kernels = {"rms_norm": True, "rope": True, "swiglu": True}
    assert asked == [(given, kernels | {"cross_entropy": False, "fused_linear_cross_entropy": False})]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (llm("mpt"), "no kernels for LLMs of the type mpt"),
        (llm(device="cpu"), "left out on a CPU"),
        (llm(device="meta"), ""),
    ],
)
def test_elsewhere_they_are_left_out(given, said, asked, capsys):
    liger.use_liger(given)
    assert not asked and said in capsys.readouterr().err


@pytest.mark.parametrize("wanted", [True, False])
def test_a_recipe_asks_for_them(wanted, monkeypatch):
    seen = []
    monkeypatch.setattr("finetune.training.train.use_liger", seen.append)
    model = tiny_composite()
    set_up(model, Train.model_validate({"liger": wanted, "stages": [STAGE]}))
    assert seen == ([model.causal_lm] if wanted else [])


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else found(name))
    with pytest.raises(RecipeError, match=r"train.liger: liger-kernel isn't installed: pip install liger-kernel"):
        check(load_recipe(tiny_recipe(tmp_path, train__liger=True)))
