import pytest
import torch

from finetune.model.projectors import resampler

OPTIONS = {"queries": 5, "width": 16, "heads": 4, "layers": 2}


@pytest.mark.parametrize("rows", [1, 7, 64, 1500])
def test_as_many_rows_come_out_as_there_are_queries(rows):
    options = resampler.Options(**OPTIONS)
    module = resampler.build(6, 10, options)
    assert module(torch.randn(2, rows, 6)).shape == (2, 5, 10) and resampler.length(rows, options) == 5


def test_what_comes_out_depends_on_every_row_and_on_their_order():
    module = resampler.build(6, 10, resampler.Options(**OPTIONS))
    features = torch.randn(1, 9, 6, requires_grad=True)
    module(features).pow(2).sum().backward()
    assert (features.grad.abs().sum(-1) > 0).all()
    with torch.no_grad():
        assert not torch.allclose(module(features), module(features.flip(1)), atol=1e-4)


def test_queries_differ():
    rows = resampler.build(6, 10, resampler.Options(**OPTIONS))(torch.randn(1, 9, 6))[0]
    assert torch.cdist(rows, rows)[~torch.eye(5, dtype=torch.bool)].min() > 1e-3


def test_positions_are_sines_and_cosines():
    rows = resampler.positions(3, 4)
    expected = torch.tensor(
        [[0.0, 0, 1, 1], [0.841471, 0.0099998, 0.540302, 0.99995], [0.909297, 0.0199987, -0.416147, 0.9998]]
    )
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"width": 30, "heads": 8}, {"width": 15, "heads": 3}])
def test_a_width_that_heads_do_not_divide_is_refused(options):
    with pytest.raises(ValueError, match="must be even and a multiple of `heads`"):
        resampler.Options(**options)
