import pytest
import torch
from packed import composite_with_lora
from tiny import tiny_composite

from finetune.common.errors import ModelError, TrainingError
from finetune.model.trainable import set_trainable


def test_set_trainable_names_what_trains():
    model = composite_with_lora()
    counts = set_trainable(model, ["projectors", "adapter"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("projectors.") or ".lora_" in name for name in trained)
    assert sum(counts.values()) == sum(p.numel() for p in trained.values())
    assert set(counts) == {"projectors.image", "adapter"}
    assert all(p.dtype == torch.float32 for p in trained.values())


def test_what_trains_and_is_not_named_is_an_error():
    """A weight that a projector shares with the LLM would train under the wrong name."""
    model = composite_with_lora()
    model.projectors["image"][2] = torch.nn.Linear(64, 32)
    model.projectors["image"][2].weight = model.causal_lm.model.layers[0].self_attn.q_proj.base_layer.weight
    with pytest.raises(TrainingError, match=r"not the parts .*q_proj"):
        set_trainable(model, ["projectors"])


def test_training_an_adapter_that_is_not_there_is_an_error():
    with pytest.raises(ModelError, match="no adapter is attached"):
        set_trainable(tiny_composite(), ["adapter"])
