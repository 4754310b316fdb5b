import pytest
import torch

from finetune.model.projectors import stack


@pytest.mark.parametrize("rows, factor", [(16, 8), (17, 8), (1, 8), (7, 2), (5, 1)])
def test_neighbours_stand_side_by_side_and_the_end_is_filled_with_zeros(rows, factor):
    features = torch.arange(1.0, 2 * rows * 3 + 1).view(2, rows, 3)
    stacked = stack.stack_rows(features, factor)
    assert stacked.shape == (2, stack.length(rows, stack.Options(factor=factor)), 3 * factor)
    flat = stacked.reshape(2, -1)
    assert torch.equal(flat[:, : rows * 3], features.flatten(1)) and not flat[:, rows * 3 :].any()


def test_it_is_ultravox_s_projector_by_hand():
    """Norm, linear, SwiGLU, norm, linear, no biases."""
    module = stack.build(6, 10, stack.Options(factor=4, hidden=8))
    _, before, first, _, between, second = module
    features = torch.randn(3, 9, 6)
    wide = stack.stack_rows(features, 4)
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * before.weight
    value, gate = (normed @ first.weight.T).split(8, -1)
    hidden = value * gate / (1 + torch.exp(-gate))
    hidden = hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * between.weight
    torch.testing.assert_close(module(features), hidden @ second.weight.T)
    assert all("bias" not in name for name, _ in module.named_parameters())
