"""Held-out shares are exact; what belongs together is on one side, whatever the order of the rows and the sources."""

import random

import pyarrow
import pytest
from pyarrow import parquet
from tiny import part, tiny_picture, tiny_recipe

from finetune.common.errors import DataError
from finetune.data.rows import read_splits, refuse_empty_splits
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Source


@pytest.mark.parametrize(("count", "test", "validation"), [(200, 20, 30), (15, 2, 2), (1000, 100, 150)])
def test_shares_are_exact_whatever_the_seed(tmp_path, count, test, validation):
    rows = [f"q{number},a" for number in range(count)]
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\n" + "\n".join(rows), encoding="utf-8")
    held = []
    for seed in range(3):
        source = Source(path=path, task=part("tasks", "answer", media=()), hold_out=0.1, hold_out_validation=0.15)
        splits = read_splits([source], seed)
        assert (len(splits.test), len(splits.validation)) == (test, validation)
        held.append({sample.question for sample in splits.test})
    assert held[0] != held[1] != held[2]
    random.Random(0).shuffle(rows)
    path.write_text("question,answer\n" + "\n".join(rows), encoding="utf-8")
    assert {sample.question for sample in read_splits([source], seed).test} == held[-1]


def test_rows_linked_by_pictures_of_theirs_are_on_one_side(tmp_path):
    """Row n has pictures n and n + 1 where n isn't a multiple of 5: four rows a chain."""
    for number in range(60):
        tiny_picture((number, 1, 1)).save(tmp_path / f"{number}.png")
    chains = [n for n in range(50) if n % 5 < 4]
    table = [{"image": [f"{n}.png", f"{n + 1}.png"], "question": f"q{n}", "answer": "a"} for n in chains]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(table), path)
    source = Source(path=path, task=part("tasks", "answer"), hold_out=0.2, media_folder=tmp_path)
    splits = read_splits([source], 3)
    assert len(splits.test) == 8  # two chains of four
    trained = {medium.key for sample in splits.train for medium in sample.media}
    assert trained.isdisjoint(medium.key for sample in splits.test for medium in sample.media)


def test_a_ranking_is_held_out_by_its_groups_which_share_pictures_and_texts(tmp_path):
    for number in range(4):
        tiny_picture((number, 9, 9)).save(tmp_path / f"{number}.png")
    path = tmp_path / "clicks.csv"
    rows = [f"u{user},{item}.png,offer {item},{int(user % 4 == item)}" for user in range(10) for item in range(4)]
    path.write_text("user,image,item,relevance\n" + "\n".join(rows), encoding="utf-8")
    task = part("tasks", "rank", media=("image",), text=("item",), group="user")
    splits = read_splits([Source(path=path, task=task, hold_out=0.2)], 1)
    assert (len(splits.train), len(splits.test)) == (32, 8)
    assert {sample.group for sample in splits.train}.isdisjoint(sample.group for sample in splits.test)


def test_rows_that_all_stay_together_cannot_be_held_out(tmp_path):
    tiny_picture((1, 1, 1)).save(tmp_path / "0.png")
    path = tmp_path / "rows.csv"
    path.write_text("image,label\n" + "".join(f"0.png,{n}\n" for n in range(8)), encoding="utf-8")
    recipe = load_recipe(tiny_recipe(tmp_path / "run"))
    for share in (0.2, 0.9):
        source = Source(path=path, task=part("tasks", "classify"), hold_out=share)
        with pytest.raises(DataError, match="rows that share media or a group stay together, here"):
            refuse_empty_splits(read_splits([source], 1), recipe)


def test_two_sources_of_the_same_pictures_hold_out_the_same_ones(tmp_path):
    for number in range(40):
        tiny_picture((number, 2, 2)).save(tmp_path / f"{number}.png")
    names = [f"{number}.png" for number in range(40)]
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    first.write_text("image,label\n" + "".join(f"{name},x\n" for name in names), encoding="utf-8")
    second.write_text("image,caption\n" + "".join(f"{name},x\n" for name in reversed(names[:30])), encoding="utf-8")
    sources = [
        Source(path=first, task=part("tasks", "classify"), hold_out=0.2),
        Source(path=second, task=part("tasks", "caption"), hold_out=0.2),
    ]
    splits = read_splits(sources, 1)
    trained = {sample.media[0].key for sample in splits.train}
    held_out = [sample.media[0].key for sample in splits.test]
    assert abs(len(held_out) - 14) <= 1 and trained.isdisjoint(held_out)
    assert {sample.source for sample in splits.test} == {0, 1}
