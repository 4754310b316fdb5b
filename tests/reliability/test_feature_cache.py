"""A cache of features that many processes fill, and that is damaged on the disk."""

import random
from multiprocessing import get_context

import pytest
import torch
from cli import cli
from safetensors.torch import load_file
from tiny import tiny_recipe

from finetune.common.errors import ArtifactError
from finetune.data.sample import Layout
from finetune.model.feature_store import FeatureStore

pytestmark = pytest.mark.slow


def features_of(number):
    return torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(number))


def fills(folder, seed, count):
    """A process that computes all features in its own order, a few at a time."""
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    store = FeatureStore(folder, "encoder")
    for start in range(0, count, 50):
        chunk = store.missing([str(number) for number in numbers[start : start + 50]])
        store.fill(((key, features_of(int(key)), Layout(4)) for key in chunk), lambda: None)


def test_many_processes_fill_one_cache(tmp_path, full, tried):
    many, count = (20, 1000) if full else (4, 200)
    processes = [get_context("fork").Process(target=fills, args=(tmp_path, seed, count)) for seed in range(many)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    store = FeatureStore(tmp_path, "encoder")
    keys = [str(number) for number in range(count)]
    store.check(keys)
    assert not store.missing(keys) and not list(tmp_path.rglob("*.tmp"))
    assert all(torch.equal(store.read(key), features_of(int(key))) for key in keys)
    tried(f"{many} processes fill one cache with {count:,} features", "none torn, none lost")


@pytest.mark.parametrize(
    "damage", ["flipped", *(pytest.param(one, marks=pytest.mark.full) for one in ("cut", "empty"))]
)
def test_a_damaged_entry_is_noticed_and_computed_anew(damage, tmp_path, tried):
    """The weights are those of a run with a whole cache."""
    recipe = tiny_recipe(tmp_path)
    first = cli("train", recipe, "--run", "first", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    content = path.read_bytes()
    spoiled = {
        "flipped": content[:-7] + bytes([content[-7] ^ 64]) + content[-6:],
        "cut": content[:-100],
        "empty": b"",
    }
    path.write_bytes(spoiled[damage])
    second = cli("train", recipe, "--run", "second", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    output = "".join(second.stderr.split())
    assert f"{path}isn'tasitwaswritten" in output and "computedanew" in output
    for name in ("adapter_model.safetensors", "projectors.safetensors"):
        left, right = (load_file(tmp_path / run / "adapter" / name) for run in ("first", "second"))
        assert all(torch.equal(left[key], right[key]) for key in left)
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    assert path.read_bytes()[-100:] == content[-100:]
    tried(f"a {damage} file of cached features", "noticed, named, computed anew: the same weights")


def test_what_is_damaged_later_is_not_read(tmp_path):
    FeatureStore(tmp_path, "encoder").fill([("a", features_of(1), Layout(4))], lambda: None)
    (path,) = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="isn't as it was written: remove it"):
        FeatureStore(tmp_path, "encoder").read("a")
