"""Files and folders that appear whole or not at all, their hashes, and the errors about those that are damaged."""

import errno
import hashlib
import json
import os

import pytest
from pydantic import BaseModel, ValidationError

from finetune.common import run_folder as module
from finetune.common.errors import ArtifactError
from finetune.common.run_folder import (
    add_lines,
    damage,
    damaged,
    flush,
    read_json,
    read_lines,
    whole_folder,
    write_hashes,
    write_json,
    write_text,
)


def names(folder):
    return {path.name for path in folder.iterdir()}


def put(path, content):
    with whole_folder(path) as partial:
        assert partial == path.with_name(f"{path.name}.partial")
        (partial / "file").write_text(content)


def test_a_folder_appears_and_is_exchanged_whole(tmp_path):
    path = tmp_path / "new" / "final"
    put(path, "first")
    assert (path / "file").read_text() == "first" and names(path.parent) == {"final"}
    with whole_folder(path) as partial:
        assert (path / "file").read_text() == "first" and not names(partial)
        (partial / "other").touch()
    assert names(path) == {"other"} and names(path.parent) == {"final"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_whose_writing_fails_leaves_the_one_before(error, tmp_path):
    put(tmp_path / "final", "first")
    with pytest.raises(error), whole_folder(tmp_path / "final") as partial:
        (partial / "file").write_text("second")
        raise error
    assert (tmp_path / "final" / "file").read_text() == "first" and names(tmp_path) == {"final"}


def test_leftovers_of_a_killed_process_are_in_nobodys_way(tmp_path):
    for name in ("final.partial", "final.old", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    put(tmp_path / "final", "second")
    assert names(tmp_path) == {"final"} and names(tmp_path / "final") == {"file"}


@pytest.mark.parametrize("number", [0, 1])
def test_whatever_interrupts_the_exchange_one_of_the_two_remains(number, tmp_path, monkeypatch):
    """The process ends at the first or second rename; the next one to write fails too, then one succeeds."""
    put(tmp_path / "final", "first")
    replace, calls = os.replace, []

    def killed(source, target):
        calls.append(source)
        if len(calls) > number:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", killed)
        put(tmp_path / "final", "second")
    assert names(tmp_path) == {"final.partial", "final.old" if number else "final"}
    with pytest.raises(OSError), whole_folder(tmp_path / "final"):
        raise OSError
    assert (tmp_path / "final" / "file").read_text() == "first" and names(tmp_path) == {"final"}
    put(tmp_path / "final", "third")
    assert (tmp_path / "final" / "file").read_text() == "third" and names(tmp_path) == {"final"}


def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(module, "flush", lambda path: flushed.append((path, path.exists())))
    put(tmp_path / "final", "first")
    partial = tmp_path / "final.partial"
    assert flushed == [(partial / "file", True), (partial, True), (tmp_path, True)]
    flushed.clear()
    write_text(tmp_path / "file.txt", "text")
    assert flushed == [(tmp_path / "file.txt.partial", True)]


@pytest.mark.parametrize("number, passes", [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_drives_that_know_no_flush_are_borne_with_and_failing_ones_are_not(number, passes, tmp_path, monkeypatch):
    def fsync(descriptor):
        opened.append(descriptor)
        raise OSError(number, "no")

    opened: list[int] = []
    monkeypatch.setattr(os, "fsync", fsync)
    if passes:
        flush(tmp_path)
    else:
        with pytest.raises(OSError):
            flush(tmp_path)
    with pytest.raises(OSError):  # closed
        os.fstat(opened[0])


def test_each_file_has_its_hash_and_the_first_damage_is_named(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b", "sub/a"):
        (tmp_path / name).write_text(name)
    assert damage(tmp_path) == f"{tmp_path}/sha256.json is missing"
    write_hashes(tmp_path)
    write_hashes(tmp_path)  # its own file isn't among them
    hashes = json.loads((tmp_path / "sha256.json").read_text())
    assert hashes == {name: hashlib.sha256(name.encode()).hexdigest() for name in ("b", "sub/a")}
    assert damage(tmp_path) is None
    (tmp_path / "sub" / "a").write_text("sub/b")
    assert damage(tmp_path) == f"{tmp_path}/sub/a isn't as it was written"
    (tmp_path / "b").unlink()
    assert damage(tmp_path) == f"{tmp_path}/b is missing"


def test_json_is_readable_and_comes_back(tmp_path):
    content = {"répertoire": [1, {"图": None}]}
    write_json(tmp_path / "new" / "a.json", content)
    text = (tmp_path / "new" / "a.json").read_text(encoding="utf-8")
    assert (
        text == json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        and read_json(tmp_path / "new/a.json") == content
    )
    assert names(tmp_path / "new") == {"a.json"}


@pytest.mark.parametrize(
    "text, found",
    [
        (None, " is missing"),
        ("[1]", " is damaged: list in place of an object; pull the model again, or make it again"),
        ("{", " is damaged: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[" * 100_000, " is damaged: maximum recursion depth exceeded"),
    ],
)
def test_what_is_no_json_object_is_named(text, found, tmp_path):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ArtifactError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}{found}")


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ArtifactError, match=r"a\.json is damaged: 'utf-8' codec can't decode"):
        read_json(tmp_path / "a.json")


class Section(BaseModel):
    sizes: list[int]


@pytest.mark.parametrize(
    "value, above, found",
    [
        ({"sizes": [1, "x", "y"]}, "", "sizes.1: Input should be a valid integer"),
        ({}, "image.", "image.sizes: Field required"),
        (3, "", "Input should be a valid dictionary or instance of Section"),
    ],
)
def test_the_first_wrong_key_of_a_file_is_named(value, above, found, tmp_path):
    with pytest.raises(ValidationError) as wrong:
        Section.model_validate(value)
    path = tmp_path / "a.json"
    text = str(damaged(str(path), wrong.value, "merge again", above))
    assert text.startswith(f"{path} is damaged: {found}") and text.endswith("; merge again")
    (tmp_path / "versions.json").write_text('{"finetune-kit": "0.0.9"}')
    assert str(damaged(path, wrong.value, "merge again", above)).startswith(f"{text} (the run is of finetune-kit 0.0.9")


def test_lines_are_added_once_and_in_order(tmp_path):
    path = tmp_path / "data" / "lines"
    assert read_lines(path) == []
    add_lines(path, ["b", "é", "b"])
    add_lines(path, iter(["c", "b", "a"]))
    assert read_lines(path) == ["b", "é", "c", "a"] and path.read_bytes() == "b\né\nc\na\n".encode()
