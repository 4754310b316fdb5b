import pytest
import torch

from finetune.model.projectors import conv


@pytest.mark.parametrize("kernel, stride, layers", [(3, 2, 2), (1, 1, 1), (5, 3, 1), (4, 2, 3), (2, 5, 1)])
def test_every_layer_leaves_one_row_of_each_stride(kernel, stride, layers):
    options = conv.Options(kernel=kernel, stride=stride, layers=layers)
    module = conv.build(6, 10, options)
    for rows in range(1, 40):
        expected = rows
        for _ in range(layers):
            expected = -(-expected // stride)
        assert module(torch.randn(1, rows, 6)).shape == (1, expected, 10)
        assert conv.length(rows, options) == expected


def test_a_layer_is_a_convolution_written_out():
    options = conv.Options(kernel=3, stride=2, layers=1)
    module = conv.build(4, 5, options)
    norm, layer, after, out = module
    features = torch.randn(1, 7, 4)
    left, right = conv.padding(7, options)
    rows = torch.cat([torch.zeros(left, 4), norm(features)[0], torch.zeros(right, 4)])
    seen = [rows[start : start + 3] for start in range(0, 7, 2)]
    convolved = torch.stack([torch.einsum("kw,owk->o", three, layer.conv.weight) + layer.conv.bias for three in seen])
    expected = out(after(torch.nn.functional.gelu(convolved)))[None]
    torch.testing.assert_close(module(features), expected)


def test_a_row_reaches_only_its_neighbourhood():
    module = conv.build(4, 5, conv.Options())  # two of kernel 3 and stride 2 see 7 rows
    features = torch.randn(1, 40, 4)
    changed = features.clone()
    changed[0, 20] += 1
    reached = (module(features) - module(changed)).abs().amax(-1)[0].nonzero().flatten().tolist()
    assert reached and all(abs(4 * row - 20) <= 7 for row in reached)
