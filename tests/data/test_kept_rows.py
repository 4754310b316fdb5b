"""Rows that are kept between runs are those that would be read anew, and are read anew where anything has changed."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from peak_bytes import peak_bytes
from tiny import part, tiny_picture

from finetune.data import media_index as index_module
from finetune.data import rows as module
from finetune.data.media_index import MediaIndex
from finetune.data.rows import Splits, SplitSummary, read_splits, summary
from finetune.data.sample_table import SampleTable
from finetune.model.bindings import bindings_of
from finetune.recipe.schema import Source

COUNT = 1200


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A file of rows about 12 pictures, all of an hour ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(12):
        tiny_picture((20 * number, 1, 1)).save(folder / f"{number}.png")
    rows = [{"image": f"{n % 12}.png", "caption": [f"a {n}", "b"], "who": f"p{n // 6}", "id": n} for n in range(COUNT)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in folder.iterdir():
        an_hour_ago(file)
    return folder


def an_hour_ago(file: Path, hours: int = 1) -> None:
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns - hours * 3600 * 10**9))


def sources(folder: Path) -> list[Source]:
    return [Source(path=folder / "rows.jsonl", task=part("tasks", "caption", references="caption"), hold_out=0.25)]


@pytest.fixture
def read(monkeypatch):
    """read(sources, seed) -> (splits, how many rows were read from their file)."""
    counted = []
    usable = module._usable_rows

    def counting(*arguments):
        for one in usable(*arguments):
            counted.append(one)
            yield one

    monkeypatch.setattr(module, "_usable_rows", counting)

    def reading(chosen, seed=0):
        counted.clear()
        return read_splits(chosen, seed), len(counted)

    return reading


def content(splits):
    return [[*splits.of(name)] for name in module.SPLITS]


def test_kept_samples_are_those_that_were_read(data, read):
    (first, count), (second, none) = read(sources(data)), read(sources(data))
    assert (count, none) == (COUNT, 0)
    assert content(first) == content(second) and first.together == second.together
    assert summary(first) == summary(second)
    sample = second.train[3]
    assert sample == [*second.train][3] and sample.target == [sample.answer, "b"] * 2
    assert sample.media[0].text == sample.answer and sample.where.startswith("rows.jsonl:")
    other, none = read(sources(data), seed=1)
    assert none == 0 and content(other) != content(first)


@pytest.mark.parametrize("change", ["row", "picture", "newer picture", "linked picture", "options"])
def test_what_has_changed_is_read_anew(change, data, read):
    if change == "linked picture":
        (data / "3.png").rename(data / "real.png")
        (data / "3.png").symlink_to(data / "real.png")
    before, _ = read(sources(data))
    chosen = sources(data)
    if change == "row":
        text = (data / "rows.jsonl").read_text().replace('"a 7"', '"c 7"')
        (data / "rows.jsonl").write_text(text)
    elif change == "picture":
        tiny_picture((1, 2, 3)).save(data / "3.png")
    elif change == "newer picture":
        an_hour_ago(data / "3.png")
    elif change == "linked picture":
        (data / "3.png").unlink()
        (data / "3.png").symlink_to(data / "4.png")
    else:
        chosen[0] = chosen[0].model_copy(update={"group": "who"})
    after, count = read(chosen)
    assert count == COUNT
    same = {sample.where: sample for split in content(before) for sample in split}
    found = {sample.where: sample for split in content(after) for sample in split}
    different = sum(found[where].messages != sample.messages for where, sample in same.items())
    keys = sum([m.key for m in found[where].media] != [m.key for m in sample.media] for where, sample in same.items())
    expected = {"row": (1, 0), "picture": (0, 100), "linked picture": (100, 100)}.get(change, (0, 0))
    assert (different, keys) == expected


def test_a_file_that_was_written_just_now_is_not_trusted(data, read):
    tiny_picture((1, 2, 3)).save(data / "3.png")
    assert [read(sources(data))[1] for _ in range(2)] == [COUNT, COUNT]
    an_hour_ago(data / "3.png")
    assert [read(sources(data))[1] for _ in range(2)] == [COUNT, 0]


def test_part_of_the_samples_are_what_a_list_would_hold(data, read):
    train = read(sources(data))[0].train
    everything = [*train]
    assert train[-1] == everything[-1] and [*train[5:9]] == everything[5:9] and len(train[5:9]) == 4
    chosen = train.select(np.array([7, 2, 2]))
    assert [*chosen] == [everything[number] for number in (7, 2, 2)]
    assert chosen.column("answer").to_pylist() == [sample.answer for sample in chosen]
    media = {medium.key for sample in everything for medium in sample.media}
    assert sorted(medium.key for medium in train.different_media(lambda kind, key: False)) == sorted(media)
    known = sorted(media)[0]
    assert {m.key for m in train.different_media(lambda kind, key: key == known)} == media - {known}
    assert train.count_media() == len(everything) and train.digest() != chosen.digest()


def test_no_list_of_all_texts_is_made(data, read):
    table, count, length = read(sources(data))[0].train.table, 10_000, 1000
    answers = pa.array([f"{number:{length}}" for number in range(count)], pa.large_string())
    place = table.schema.get_field_index("answer")
    rows = SampleTable(table.take([0] * count).set_column(place, "answer", answers), ["caption"], [1.0])
    half = rows.select(range(0, count, 2))
    expected = SplitSummary(rows=count // 2, media=count // 2, different_answers=count // 2, answers={})
    assert summary(Splits(half, half, half))["train"] == expected
    for work in (lambda: summary(Splits(half, half, half)), lambda: bindings_of(sources(data), half)):
        assert peak_bytes(work) < 0.6 * length * count // 2


def test_hashes_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    read = []
    real = index_module.file_hash
    monkeypatch.setattr(index_module, "file_hash", lambda path: read.append(path) or real(path))
    file = tmp_path / "a.png"

    def hashed(content: str | None = None) -> str:
        """By an index in a process of its own."""
        if content is not None:
            file.write_text(content)
            an_hour_ago(file)
        index = MediaIndex(tmp_path / "cache" / "index.sqlite")
        digest = index.sha256(file)
        index.write()
        return digest

    first = hashed("one")
    assert hashed() == first and len(read) == 1
    assert hashed("two!") != first and len(read) == 2
    file.write_text("new!")  # of the same length, and with its time of now
    assert hashed() != first and hashed() and len(read) == 4
    (tmp_path / "cache" / "index.sqlite").write_text("no database")
    an_hour_ago(file)
    assert hashed() == real(file)


def test_inodes_of_network_drives_fit_where_they_are_kept(data, read, monkeypatch):
    """They have 64 bits without a sign."""
    stat = os.stat

    class Status:
        def __init__(self, status):
            self.status = status

        def __getattr__(self, name):
            return self.status.st_ino + 2**63 if name == "st_ino" else getattr(self.status, name)

    monkeypatch.setattr(os, "stat", lambda path, **options: Status(stat(path, **options)))
    chosen = sources(data)
    splits, count = read(chosen)
    assert count == COUNT and content(splits) == content(read(chosen)[0])


class Payload:
    """Unpickled it makes a folder."""

    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)


def test_a_pickle_among_the_kept_rows_is_not_executed(data, read, tmp_path):
    wanted = content(read(sources(data))[0])
    (file,) = (tmp_path / "cache").rglob("split-*.npz")
    np.savez(file, split=np.array([Payload(tmp_path / "executed")], object), together=np.zeros(0, np.int64))
    assert content(read(sources(data))[0]) == wanted
    assert not (tmp_path / "executed").exists()
