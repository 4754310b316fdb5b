"""Rows of a folder that are one file each are named after it, in messages and in the check of the data."""

import pytest
from tiny import tiny_picture, tiny_recipe

import finetune
from finetune.common.errors import DataError
from finetune.data.read import file_names, read_rows
from finetune.recipe.schema import RowFile


def test_rows_of_folders_are_named_after_their_files(tmp_path):
    recipe = tiny_recipe(tmp_path)
    pictures = tmp_path / "pics"
    for number in range(12):
        label, colour = [("red", (200, 0, 0)), ("blue", (0, 0, 200 - number))][number % 2]
        (pictures / label).mkdir(parents=True, exist_ok=True)
        tiny_picture(colour).save(pictures / label / f"{number}.png")
    source = RowFile(path=pictures)
    named = [row.where for row in read_rows(source, 10**9)]
    assert named == file_names(source) and len(named) == 12
    assert named[0] == "pics/blue/1.png" and named[-1] == "pics/red/8.png"
    (pictures / "blue" / "11.png").write_bytes(b"no picture")
    changed = finetune.load_recipe(recipe).with_(data=[{"path": str(pictures), "task": "classify", "hold_out": 0.3}])
    found = finetune.data_check(changed, out=tmp_path / "checked", workers=0)
    assert found.summary["examples"]["medium"].startswith("pics/blue/11.png: ")
    (pictures / "blue" / "11.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"pics/blue/11\.png: image of 0 bytes"):
        finetune.check(changed)
    assert file_names(RowFile(path=tmp_path / "data" / "train.csv")) == []
