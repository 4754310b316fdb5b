"""Rows that a run evaluates stay those that it began with."""

import pytest
from tiny import tiny_dataset, tiny_picture, tiny_recipe

from finetune.common.errors import ArtifactError, DataError
from finetune.common.run_folder import RunFolder
from finetune.data.rows import read_splits
from finetune.data.run_rows import keep_rows, splits_of_run
from finetune.recipe.load import load_recipe


@pytest.fixture
def begun(tmp_path):
    """(run folder, recipe, the rows' file) of a run that holds 8 of 40 rows out."""
    path = tiny_dataset(tmp_path / "data", train=40) / "train.csv"
    recipe = load_recipe(tiny_recipe(tmp_path, data=[{"path": str(path), "task": "classify", "hold_out": 0.2}]))
    folder = RunFolder(tmp_path / "run")
    folder.data.mkdir(parents=True)
    keep_rows(folder, read_splits(recipe.data, recipe.seed), recipe)
    return folder, recipe, path


def names(samples):
    return [sample.media[0].path.name for sample in samples]


def test_more_rows_change_nothing_of_what_is_evaluated(begun):
    folder, recipe, path = begun
    before = read_splits(recipe.data, recipe.seed)
    for number in range(40):
        tiny_picture((number, 200, 1)).save(path.parent / f"new{number}.png")
    header, *lines = path.read_text().splitlines()
    lines = [*(f"new{number}.png,red" for number in range(40)), *lines]
    path.write_text("\n".join([header, *lines]))
    assert len(read_splits(recipe.data, recipe.seed).test) == 16
    keep_rows(folder, read_splits(recipe.data, recipe.seed), recipe)  # a resumed run keeps what it began with
    after = splits_of_run(folder, recipe)
    assert names(after.test) == names(before.test) and len(after.test) == 8
    assert not {*names(after.train)} & {*names(after.test)}


def test_a_held_out_row_that_was_changed_is_named_with_its_file(begun):
    folder, recipe, path = begun
    row = read_splits(recipe.data, recipe.seed).test[0]
    lines = path.read_text().splitlines()
    number = int(row.where.split(":")[1]) - 1
    lines[number] = lines[number].split(",")[0] + ",purple"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        splits_of_run(folder, recipe)
    assert f"{path}: changed since" in str(caught.value) and "1 of 8" in str(caught.value)
    assert str(caught.value).endswith(row.where) and "train anew" in str(caught.value)


def test_a_damaged_list_of_held_out_rows_is_named(begun):
    folder, recipe, _ = begun
    (folder.data / "held_out.json").write_text('{"test": [{"key": 3}]}')
    with pytest.raises(ArtifactError, match=r"held_out.json is damaged: validation: Field required"):
        splits_of_run(folder, recipe)
