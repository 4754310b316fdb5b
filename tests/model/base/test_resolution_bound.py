"""`media.shrink_to_pixels`: larger pictures are smaller before a base's processor sees them, wherever they are read."""

from pathlib import Path

import PIL.ImageFile
import pytest
import torch
from families import family_folder, noise

from finetune.data.media import decode
from finetune.data.media.image import shrunk_size
from finetune.data.sample import Medium
from finetune.model.build import load_components
from finetune.model.features import Features, features_key
from finetune.recipe.schema import Base, Limits, Model

BOUND = Limits(shrink_to_pixels=32 * 32)


@pytest.mark.parametrize("size", [(80, 48), (48, 80), (4000, 3), (1, 10_000), (33, 32)])
def test_a_larger_picture_keeps_its_shape_within_the_bound(size):
    width, height = shrunk_size(*size, BOUND)
    assert 0.9 * 1024 < width * height <= 1024 or min(width, height) <= 3
    assert shrunk_size(width, height, BOUND) == (width, height)
    if min(width, height) > 3:
        assert width / height == pytest.approx(size[0] / size[1], rel=0.05)


def test_small_pictures_are_left_alone_to_the_bit():
    picture = noise((32, 32))
    assert decode("image", picture, limits=BOUND).tobytes() == picture.tobytes()


def test_tiles_are_fewer_and_known_before_a_pixel_is_decoded(tmp_path, monkeypatch):
    folder = family_folder("llava_next", tmp_path / "base")
    model = Model(base=Base(name=str(folder), quantize="none"))
    encoders = load_components(model, {}, 0, torch.device("cpu")).encoders
    path = tmp_path / "picture.jpg"
    noise((160, 96)).save(path)
    medium = Medium("image", path)
    plain, bounded = (Features(encoders, None, limits) for limits in (Limits(), BOUND))
    prepared = bounded.prepared(medium)
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda self: pytest.fail("a pixel was decoded"))
    known = encoders["image"].layout_at(medium, BOUND)
    monkeypatch.undo()
    assert known == prepared.layout == bounded.layout(medium)
    rows = [layout.rows * len(layout.marks) for layout in (plain.layout(medium), known)]
    assert rows[1] < rows[0]
    assert bounded.features(medium).shape[-2] == rows[1]
    small = tmp_path / "small.png"  # as if the file had been that small
    decode("image", path, limits=BOUND).save(small)
    assert torch.equal(plain.features(Medium("image", Path(small))), bounded.features(medium))


def test_features_of_another_bound_are_others():
    class Encoded:
        fingerprint = "weights"

    keys = [features_key("image", Encoded(), limits) for limits in (Limits(), BOUND, Limits(max_bytes=1))]
    assert keys[0] == keys[2] != keys[1]
    assert features_key("audio", Encoded(), BOUND) == features_key("audio", Encoded(), Limits())
