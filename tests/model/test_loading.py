"""Weights that don't fit are refused, with their names."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llm

from finetune.common.errors import ArtifactError
from finetune.model.load import load_exactly


@pytest.fixture
def saved(tmp_path):
    model = tiny_llm().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_equal_weights_are_read_in_their_own_dtype(saved):
    model, folder = saved
    again = load_exactly(type(model), folder)
    assert again.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert load_exactly(type(model), folder, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    "change, key",
    [
        (lambda state: state.pop("model.norm.weight"), r"'missing_keys': \['model.norm.weight'\]"),
        (lambda state: state.update(other=torch.ones(3)), r"'unexpected_keys': \['other'\]"),
    ],
)
def test_missing_and_unexpected_weights_are_refused(saved, change, key):
    model, folder = saved
    rewrite(folder, change)
    with pytest.raises(ArtifactError, match=key):
        load_exactly(type(model), folder)


def test_weights_of_another_shape_are_refused(saved):
    model, folder = saved
    rewrite(folder, lambda state: state.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(ArtifactError, match=r"'mismatched_keys': \[.*model.norm.weight"):
        load_exactly(type(model), folder, ignore_mismatched_sizes=True)
