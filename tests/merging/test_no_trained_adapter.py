"""Runs whose stages train no adapter are merged as what they are: the LLM with trained projectors."""

import json
import shutil

import pytest
import torch
from cli import cli
from safetensors.torch import load_file
from tiny import tiny_recipe
from trained_runs import trained

import finetune
from finetune.common.certificate import UNTRAINED
from finetune.common.errors import MergeRefused

ALIGN = [{"name": "align", "trains": ["projectors"], "learning_rate": 1.0e-2, "epochs": 2}]


@pytest.fixture(autouse=True)
def without_a_plan(monkeypatch):
    """`check` doesn't wait for it."""
    monkeypatch.setattr("finetune.training.plan.apart.LINE_SECONDS", 0.0)


@pytest.mark.parametrize("adapter", [None, {"rank": 4}], ids=["null", "untrained"])
def test_trained_projectors_are_merged_and_untrained_ones_are_refused(adapter, tmp_path):
    recipe = tiny_recipe(tmp_path, adapter=adapter, train__stages=ALIGN)
    told = cli("check", recipe).stdout
    assert f"{'adapter is null' if adapter is None else 'no stage trains the adapter'}: the merged model is the" in told
    run = trained(recipe)
    certificate = finetune.merge(run)
    assert certificate.base_is == UNTRAINED and certificate.saved.kl_from_base > 1e-6 > certificate.saved.kl
    merged, llm = load_file(run / "merged/model.safetensors"), load_file(tmp_path / "llm/model.safetensors")
    assert all(torch.equal(tensor, merged[f"language_model.{name}"]) for name, tensor in llm.items())
    idle = trained(recipe, ["train.stages.0.learning_rate=1e-30"], tmp_path / "idle")
    shutil.copy(idle / "adapter/projectors.safetensors", run / "adapter")
    with pytest.raises(MergeRefused, match="equals the untrained model: no stage trains the adapter"):
        finetune.merge(run)
    assert json.loads((run / "metrics.json").read_text())["merge"]["refused"].startswith("the merged model equals")
    page = finetune.report(run).path.read_text()
    assert "The merge was refused" in page and "What follows is about an earlier merge" in page


def test_a_recipe_that_trains_its_adapter_gets_no_remark(tmp_path):
    assert "the merged model is" not in cli("check", tiny_recipe(tmp_path)).stdout
