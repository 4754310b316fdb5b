import tarfile

import pytest
import tiny_formats
from tiny_formats import picture, tar

from finetune.common.errors import DataError
from finetune.data.formats import webdataset


def read(path):
    return list(webdataset.rows(path, webdataset.Options()))


def test_files_of_one_name_are_a_row_and_shards_follow_each_other(tmp_path):
    path = tiny_formats.webdataset(tmp_path)
    first = {"image": picture(), "label": "3", "text": "红", "caption": "红", "__key__": "0001"}
    second = {"audio": tiny_formats.sound(), "speaker": "ann", "__key__": "x/0002"}
    assert read(path) == [(1, first), (2, second)]
    assert read(path / "1.tar") == [(1, second)]


def test_every_suffix_has_its_column(tmp_path):
    files = {
        "./a.left.jpg": b"l",
        "./a.right.jpg": b"r",
        "./a.mp4": b"v",
        "./a.npy": b"n",
        "./a.json": b'{"text": "of json", "messages": [{"role": "user", "content": "<video>x"}]}',
        "./a.txt": b"of txt",
        "./._a.jpg": b"left by a Mac",
        "__MACOSX/a.jpg": b"too",
    }
    ((_, row),) = read(tar(tmp_path / "x.tar", files))
    said = [{"type": "video", "video": b"v"}, {"type": "text", "text": "x"}]
    assert row.pop("messages") == [{"role": "user", "content": said}]
    assert row == {
        "left.jpg": b"l",
        "right.jpg": b"r",
        "video": b"v",
        "npy": b"n",
        "text": "of txt",
        "caption": "of txt",
        "__key__": "a",
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jpg": b"1", "a.png": b"2"}, "a: two files for the column 'image'"),
        ({"a.json": b"[1]"}, "a.json: a list, not an object"),
        ({"a.json": b"{"}, "a.json: can't be read as text"),
        ({"a.txt": b"\xff"}, "a.txt: can't be read as text"),
    ],
)
def test_a_wrong_row_is_named_by_shard_and_key(files, message, tmp_path):
    with pytest.raises(DataError, match=rf"x\.tar: {message}"):
        read(tar(tmp_path / "x.tar", files))


def test_links_and_giants_are_refused(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(DataError, match=r"'a.jpg' is a link or device"):
        read(tmp_path / "x.tar")
    monkeypatch.setattr(webdataset, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="has 11 bytes, over 10"):
        read(tar(tmp_path / "x.tar", {"a.jpg": b"12345678901"}))


def test_a_damaged_shard_is_never_just_shorter(tmp_path):
    """Cut at every block, and every header destroyed: tarfile itself stops there without a word."""
    path = tar(tmp_path / "x.tar", {f"{n}.txt": b"x" * 600 for n in range(3)})
    whole = path.read_bytes()
    for end in range(0, 3 * 1536 + 1, 512):
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match=rf"{path}: damaged .*at byte \d+"):
            read(path)
    for start in range(0, 3 * 1536, 1536):
        path.write_bytes(whole[:start] + b"\1" * 512 + whole[start + 512 :])
        with pytest.raises(DataError, match=f"at byte {start}"):
            read(path)
    with pytest.raises(DataError, match=r"no .tar in it"):
        (tmp_path / "none").mkdir()
        read(tmp_path / "none")
