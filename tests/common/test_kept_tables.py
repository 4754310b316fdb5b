import os

import pyarrow as pa
import pytest

from finetune.common import kept_tables
from finetune.common.errors import DataError
from finetune.common.kept_tables import BATCH, FILE, UNUSED_SECONDS, keep, opened

SCHEMA = pa.schema({"number": pa.int64()})


def rows(count: int, broken_at: int = -1):
    for number in range(count):
        if number == broken_at:
            raise DataError("broken")
        yield {"number": number}


@pytest.mark.parametrize("count", [0, 1, BATCH - 1, BATCH, 2 * BATCH + 1])
def test_rows_come_back_and_only_many_are_kept(count, tmp_path):
    folder = tmp_path / "kept" / "key"
    for place in (folder, None):
        assert keep(place, SCHEMA, rows(count)).column("number").to_pylist() == list(range(count))
    assert folder.is_dir() == (count >= BATCH)
    if count >= BATCH:
        assert opened(folder).column("number").to_pylist() == list(range(count))
        assert [entry.name for entry in folder.parent.iterdir()] == ["key"]


def test_nothing_is_left_of_rows_that_break_off_or_are_not_to_be_kept(tmp_path):
    folder = tmp_path / "key"
    with pytest.raises(DataError, match="broken"):
        keep(folder, SCHEMA, rows(3 * BATCH, broken_at=2 * BATCH))
    table = keep(folder, SCHEMA, rows(BATCH), finish=lambda writing: not (writing / FILE).is_file())
    assert table.num_rows == BATCH and [*tmp_path.iterdir()] == []


def test_a_damaged_file_is_as_none(tmp_path):
    keep(tmp_path / "key", SCHEMA, rows(BATCH))
    path = tmp_path / "key" / FILE
    path.write_bytes(path.read_bytes()[:-40])
    assert opened(tmp_path / "key") is None and opened(tmp_path / "none") is None


def test_what_was_not_used_for_long_makes_room(tmp_path):
    for name in ("old", "used"):
        keep(tmp_path / name, SCHEMA, rows(BATCH))
        os.utime(tmp_path / name, (0, kept_tables.time() - UNUSED_SECONDS - 60))
    opened(tmp_path / "used")
    keep(tmp_path / "new", SCHEMA, rows(BATCH))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["new", "used"]


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    assert keep(tmp_path / "file" / "key", SCHEMA, rows(BATCH)).num_rows == BATCH
