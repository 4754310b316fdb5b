import pytest
import tiny_formats

from finetune.common.errors import DataError
from finetune.data.formats import folders


def read(path, **options):
    return list(folders.rows(path, folders.Options(**options)))


def test_each_folder_is_a_label_in_a_stable_order(tmp_path):
    path = tiny_formats.folders(tmp_path)
    tiny_formats.put(path / "dogs" / "bark.WAV", b"x")
    assert read(path) == [
        (1, {"image": "cats/1.png", "label": "cats"}),
        (2, {"image": "cats/2.PNG", "label": "cats"}),
        (3, {"image": "dogs/b.png", "label": "dogs"}),
        (4, {"audio": "dogs/bark.WAV", "label": "dogs"}),
    ]


def test_what_is_no_medium_is_listed_unless_it_is_ignored(tmp_path):
    path = tiny_formats.folders(tmp_path)
    for name in ("cats/notes.txt", "README.md", "cats/Thumbs.db"):
        tiny_formats.put(path / name, "x")
    with pytest.raises(DataError, match=r"2 files or folders that aren't media .*: README.md, cats/notes.txt; remove"):
        read(path)
    assert len(read(path, ignore=[".txt", ".MD"])) == 3
    tiny_formats.put(path / "cats" / "more" / "1.png", b"x")
    with pytest.raises(DataError, match=r": cats/more; remove"):
        read(path, ignore=[".txt", ".md"])


def test_splits_taken_for_labels_and_empty_labels_are_refused(tmp_path):
    path = tiny_formats.folders(tmp_path / "train")
    assert not folders.detects(tmp_path)
    with pytest.raises(DataError, match="choose a path whose folders are the labels"):
        read(tmp_path)
    (path / "birds").mkdir()
    with pytest.raises(DataError, match="birds: no media in it"):
        read(path)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no folder in it"):
        read(tmp_path / "none")
