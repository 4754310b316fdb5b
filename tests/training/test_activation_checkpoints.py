"""Activation checkpoints at every n-th layer: what is computed again, and that nothing else changes."""

from collections import Counter

import pytest
import torch
from tiny import PLACEHOLDER, part, tiny_encoder, tiny_llm

from finetune.model.adapter import attach
from finetune.model.compose import compose
from finetune.recipe.schema import Adapter, Train
from finetune.training.train import set_up

STAGE = {"name": "tune", "trains": ["adapter"], "learning_rate": 1.0e-3}


def step(every: int) -> tuple[float, dict[str, torch.Tensor], list[int]]:
    """The loss of a row with a picture, its gradients, and how often each of four layers was computed."""
    torch.manual_seed(0)
    model = compose(
        tiny_llm(num_hidden_layers=4),
        encoders={"image": tiny_encoder()},
        projectors={"image": part("projectors", "pixel_shuffle")},
        fusion=part("fusion", "prefix"),
        placeholder_ids={"image": PLACEHOLDER},
    )
    attach(model, Adapter(rank=4))
    for name, parameter in model.language_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    set_up(model, Train.model_validate({"checkpoint_every_n_layers": every, "stages": [STAGE]}))
    computed: Counter[int] = Counter()
    for number, layer in enumerate(model.causal_lm.model.layers):
        layer.input_layernorm.register_forward_pre_hook(lambda *_, number=number: computed.update([number]))
    ids = torch.tensor([[5, 6, *[PLACEHOLDER] * 4, 7, 8, 9, 10]])
    labels = ids.masked_fill(ids == PLACEHOLDER, -100)
    loss = model.train()(ids, media={"image": [torch.randn(1, 3, 32, 32)]}, labels=labels).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, [computed[number] for number in range(4)]


@pytest.mark.parametrize(("every", "computed"), [(1, [2, 2, 2, 2]), (2, [2, 1, 2, 1]), (3, [2, 1, 1, 2])])
def test_every_nth_layer_is_computed_again(every, computed):
    loss, gradients, once = step(0)
    assert once == [1, 1, 1, 1] and len(gradients) > 50 and all(g.abs().max() > 0 for g in gradients.values())
    again = step(every)
    assert again[2] == computed and again[0] == pytest.approx(loss, rel=1e-6)
    assert again[1].keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(again[1][name], gradient, rtol=1e-4, atol=1e-6), name
