import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_composite, tiny_dataset, tiny_encoder

from finetune.common.errors import DataError
from finetune.data.media import decode
from finetune.data.sample import Layout, Medium
from finetune.model import feature_store as module
from finetune.model.encoders import vision
from finetune.model.feature_store import FeatureStore
from finetune.model.features import Features, features_key
from finetune.recipe.schema import Limits


@pytest.fixture
def media(tmp_path):
    return [Medium("image", path) for path in sorted((tiny_dataset(tmp_path / "data") / "images").iterdir())[:6]]


def fill(encoder, media, folder) -> Features:
    features = Features({"image": encoder}, folder)
    missing = features.missing(media)["image"]
    features.fill(missing, lambda: None)
    return features


def test_cached_features_are_those_computed_to_the_bit_in_any_order(media, tmp_path):
    encoder = tiny_encoder()
    model = tiny_composite(encoder=encoder)
    fill(encoder, media[:2], tmp_path / "cache")
    cached = fill(encoder, [*media[2:][::-1], *media[:2]], tmp_path / "cache")  # goes on with what is there
    fresh = Features({"image": encoder}, None)
    prepared = [encoder.prepare(decode("image", medium.path)) for medium in media]
    through_model = model.encode("image", [one.values for one in prepared])
    for medium, expected in zip(media, through_model, strict=True):
        assert torch.equal(cached.features(medium), expected)
        assert torch.equal(fresh.features(medium), expected)
    assert not torch.equal(through_model[0], through_model[1])


@pytest.mark.parametrize("batch, workers", [(1, 0), (4, 0), (2, 1)])
def test_broken_media_are_all_named_and_the_others_kept(media, batch, workers, tmp_path):
    encoder = tiny_encoder()
    for number in (1, 4):
        media[number].path.write_text(f"no picture {number}")
    features = Features({"image": encoder}, tmp_path / "cache")
    rows = [Medium("image", medium.path, where=f"rows.csv:{number}") for number, medium in enumerate(media)]
    keys = [medium.key for medium in rows]
    with pytest.raises(DataError, match="2 of 5 media can't be used") as error:
        features.fill(rows[:5], lambda: None, batch, workers)
    assert "rows.csv:1" in str(error.value) and "rows.csv:4" in str(error.value)
    assert features.stores["image"].missing(keys) == [keys[1], keys[4], keys[5]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_comes_back(dtype, tmp_path):
    rows = torch.randn(1, 4, 8).to(dtype)
    FeatureStore(tmp_path, "f").fill([("a", rows, Layout(1))], lambda: None)
    read = FeatureStore(tmp_path, "f").read("a")
    assert read.dtype == dtype and torch.equal(read, rows)


def test_a_medium_is_known_by_its_content(tmp_path):
    for name, content in (("a.png", b"one"), ("b.png", b"one"), ("c.png", b"two")):
        (tmp_path / name).write_bytes(content)
    first, copied, changed = (Medium("image", tmp_path / name).key for name in ("a.png", "b.png", "c.png"))
    assert first == copied != changed
    (tmp_path / "a.png").write_bytes(b"three")
    assert Medium("image", tmp_path / "a.png").key not in (first, changed)


def test_a_medium_is_the_same_whatever_row_names_it(tmp_path):
    path = tmp_path / "a.png"
    medium, other = Medium("image", path, "a square", "rows.csv:2"), Medium("image", path, None, "rows.csv:9")
    assert medium == other and len({medium, other}) == 1
    assert medium.place == f"rows.csv:2: {path}" and Medium("image", path).place == ""
    assert medium != Medium("video", path) and medium != Medium("image", tmp_path / "b.png")


def test_a_key_that_is_known_is_not_read_from_the_file(tmp_path):
    assert Medium("image", tmp_path / "absent.png", known_key="k").key == "k"
    with pytest.raises(FileNotFoundError):
        Medium("image", tmp_path / "absent.png").key  # noqa: B018


def test_each_medium_is_computed_once(tmp_path):
    store = FeatureStore(tmp_path, "f")
    assert store.missing(["a", "b", "a"]) == ["a", "b"]
    store.fill([(key, torch.ones(1, 1, 1), Layout(1)) for key in "ab"], lambda: None)
    assert store.missing(["a", "b", "c"]) == ["c"]
    assert FeatureStore(tmp_path, "f").missing(["a", "b", "c"]) == ["c"]
    assert FeatureStore(tmp_path, "g").missing(["a"]) == ["a"]  # another encoder's


def test_what_changes_features_changes_the_fingerprint():
    encoder = tiny_encoder()
    same = vision.wrap(copy.deepcopy(encoder.module), encoder.processor, vision.Options(name="elsewhere"))
    assert same.fingerprint == encoder.fingerprint
    module = copy.deepcopy(encoder.module)
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1e-3
    processor = copy.deepcopy(encoder.processor)
    processor.image_mean = [0.4, 0.5, 0.5]
    others = [
        vision.wrap(module, encoder.processor, encoder.options),
        vision.wrap(encoder.module, processor, encoder.options),
        vision.wrap(encoder.module, encoder.processor, vision.Options(name="tiny", layer=-2)),
        vision.wrap(encoder.module, encoder.processor, vision.Options(name="tiny", tokens="all")),
        vision.wrap(copy.deepcopy(encoder.module).to(torch.bfloat16), encoder.processor, encoder.options),
    ]
    assert len({encoder.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)


def test_a_damaged_file_is_named_and_removed(tmp_path, capsys):
    store = FeatureStore(tmp_path, "f")
    store.fill([("a", torch.ones(1, 1, 64), Layout(1))], lambda: None)
    (path,) = store.folder.iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    assert FeatureStore(tmp_path, "f").missing(["a"]) == ["a"] and not path.exists()
    assert path.name in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_fill_leaves_whole_files_and_goes_on(error, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 2 * 16 * 4)  # two media a file
    calls: list[str] = []

    def compute(keys: list[str]) -> Iterator[tuple[str, torch.Tensor, Layout]]:
        for key in keys:
            first = key not in calls
            calls.append(key)
            if key == "3" and first:
                raise error
            yield key, torch.full((1, 1, 16), float(key)), Layout(1, (f"{key}s ",))

    keys = [str(number) for number in range(6)]
    with pytest.raises(error):
        FeatureStore(tmp_path, "f").fill(compute(keys), lambda: None)
    folder: Path = FeatureStore(tmp_path, "f").folder
    assert {path.suffix for path in folder.iterdir()} == {".safetensors"}
    assert sorted(key for path in folder.iterdir() for key in load_file(path)) == ["0", "1", "2"]
    store = FeatureStore(tmp_path, "f")
    store.fill(compute(store.missing(keys)), lambda: None)
    assert sorted(calls) == sorted([*keys, "3"])  # none computed twice but the one that failed
    assert [store.read(key)[0, 0, 0].item() for key in keys] == [0, 1, 2, 3, 4, 5]
    assert [store.layout(key) for key in keys] == [Layout(1, (f"{key}s ",)) for key in keys]


def test_features_are_computed_anew_where_files_are_decoded_otherwise(monkeypatch):
    encoder = tiny_encoder()
    before = features_key("image", encoder, Limits())
    assert before == features_key("image", encoder, Limits()) != features_key("audio", encoder, Limits())
    monkeypatch.setattr("finetune.data.media.DECODING", 2)
    assert features_key("image", encoder, Limits()) != before
