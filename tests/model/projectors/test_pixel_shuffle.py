import pytest
import torch

from finetune.common.errors import ModelError
from finetune.model.projectors import pixel_shuffle


@pytest.mark.parametrize("side, factor", [(4, 2), (6, 2), (6, 3), (4, 4), (3, 1)])
def test_each_row_holds_the_patches_of_one_square(side, factor):
    features = torch.randn(2, side * side, 5)
    merged = pixel_shuffle.merge_squares(features, factor)
    grid = features.view(2, side, side, 5)
    number = 0
    for top in range(0, side, factor):
        for left in range(0, side, factor):
            patches = [grid[:, top + down, left + right] for down in range(factor) for right in range(factor)]
            assert torch.equal(merged[:, number], torch.cat(patches, -1))
            number += 1
    options = pixel_shuffle.Options(factor=factor)
    assert merged.shape[1] == number == pixel_shuffle.length(side * side, options)
    assert pixel_shuffle.build(5, 8, options)(features).shape == (2, number, 8)


@pytest.mark.parametrize("rows, factor", [(15, 2), (25, 2), (36, 4)])
def test_a_grid_that_the_factor_does_not_divide_is_refused(rows, factor):
    with pytest.raises(ModelError, match=f"{rows} rows"):
        pixel_shuffle.length(rows, pixel_shuffle.Options(factor=factor))
