"""Training rows that are kept as tokens are those that would be made anew, and are made anew where it matters."""

import hashlib
import json

import pytest
from tiny import tiny_dataset, tiny_recipe

from finetune.common import kept_tables
from finetune.common.errors import DataError
from finetune.common.run_folder import RunFolder
from finetune.data.rows import read_splits
from finetune.model.bindings import bindings_of
from finetune.model.run import Run
from finetune.recipe.load import load_recipe
from finetune.training import kept_samples as module
from finetune.training.kept_samples import PLACES, tokenized_samples
from finetune.training.samples import tokenized


@pytest.fixture
def made(tmp_path, monkeypatch):
    """made(overrides) -> (samples as tokens, their digest, how many were tokenized for it)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for place in (kept_tables, module):
        monkeypatch.setattr(place, "BATCH", 8)
    counted = []

    def counting(samples, run):
        for one in tokenized(samples, run):
            counted.append(one)
            yield one

    monkeypatch.setattr(module, "tokenized", counting)
    path = tiny_dataset(tmp_path / "data", train=24) / "train.csv"
    recipe = tiny_recipe(tmp_path, data=[{"path": str(path), "task": "classify", "hold_out": 0.2}])

    def make(*overrides):
        counted.clear()
        loaded = load_recipe(recipe, overrides)
        train = read_splits(loaded.data, loaded.seed).train
        run = Run.load(RunFolder(tmp_path / "run"), loaded, bindings_of(loaded.data, train))
        samples, digest = tokenized_samples(train, run)
        return samples, digest, len(counted)

    return make


def rows(samples):
    return [samples[number] for number in range(len(samples))]


def test_rows_are_tokenized_once(made):
    first, digest, count = made()
    second, again, none = made()
    assert count == len(first) == len(second) >= 16 and none == 0
    assert rows(first) == rows(second) and digest == again
    expected = hashlib.sha256()
    for row in rows(second):
        kept = {name: value for name, value in vars(row).items() if name not in PLACES}
        expected.update(json.dumps(kept).encode())
    assert digest == expected.hexdigest()
    assert [*second.lengths] == [len(row.input_ids) for row in rows(second)]
    chosen = second.select([1, 4])
    assert rows(chosen) == [second[1], second[4]] and chosen.column("where") == [second[1].where, second[4].where]


@pytest.mark.parametrize("override", ["data.0.task.prompt=Which?", "data.0.loss_weight=0.5", "seed=5"])
def test_other_rows_are_tokenized_anew(made, override):
    _, digest, _ = made()
    _, other, count = made(override)
    assert count and other != digest
    assert made()[1:] == (digest, 0) and made(override)[1:] == (other, 0)


def test_kept_rows_that_are_too_long_now_are_named(made):
    made()
    with pytest.raises(DataError, match=r"training rows can't be used:\n  train.csv:.* more than a row holds"):
        made("train.tokens_per_batch=16")
