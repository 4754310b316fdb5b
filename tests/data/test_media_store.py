import base64
import hashlib
import io

import numpy as np
import PIL.Image
import pytest
import soundfile
from tiny_formats import picture

from finetune.common.errors import DataError, MediaError
from finetune.data.media_store import data_uri_content, store_folder, stored, suffix_of


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "finetune" / "media"


def test_each_content_is_one_file_under_its_hash(store):
    content = picture()
    path = stored(content, "x", 10**6)
    assert path.is_relative_to(store) and path.read_bytes() == content and store == store_folder()
    assert path.name == hashlib.sha256(content).hexdigest() + ".png"
    before = path.stat().st_mtime_ns
    assert stored(content, "x", 10**6) == path and path.stat().st_mtime_ns == before
    path.write_bytes(b"half")  # as a crash of another program might leave it
    assert stored(content, "x", 10**6).read_bytes() == content
    assert [file for file in store.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize("size", [0, 11])
def test_too_much_and_nothing_are_refused(size, store):
    with pytest.raises(MediaError, match=rf"rows.csv:2: holds a medium of {size} bytes; 1 to 10"):
        stored(b"x" * size, "rows.csv:2", 10)
    assert not store.exists()


@pytest.mark.parametrize("name", ["png", "jpeg", "gif", "bmp", "tiff", "webp"])
def test_suffixes_of_what_pillow_writes(name):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 4)).save(buffer, name)
    assert suffix_of(buffer.getvalue()) == {"jpeg": ".jpg"}.get(name, f".{name}")


@pytest.mark.parametrize("name", ["wav", "flac", "ogg", "mp3"])
def test_suffixes_of_what_libsndfile_writes(name):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(8000, np.float32), 16_000, format=name)
    assert suffix_of(buffer.getvalue()) == f".{name}"


def test_suffixes_of_others():
    assert suffix_of(b"\0\0\0\x20ftypisom") == ".mp4" and suffix_of(b"\x1aE\xdf\xa3...") == ".mkv"
    assert suffix_of(bytes(128) + b"DICM") == ".dcm" and suffix_of(b"") == suffix_of(b"text") == ".bin"


@pytest.mark.parametrize("uri", ["data:image/png;base64,{}", "data:;base64,{}", "data:image/png;charset=x;BASE64,{}"])
def test_data_uris_give_their_bytes(uri):
    content = bytes(range(256))
    coded = base64.b64encode(content).decode()
    assert data_uri_content(uri.format(coded), "x") == content
    assert data_uri_content(uri.format(f"{coded[:9]}\n {coded[9:]}"), "x") == content
    assert data_uri_content(uri.format(coded.replace("+", "%2B").replace("/", "%2F")), "x") == content
    assert data_uri_content("data:text/plain,a%20b%FF", "x") == b"a b\xff"


@pytest.mark.parametrize(
    "uri", ["data:image/png;base64", "data:image/png;base64,A", "data:;base64,@@@@", "data:;base64,红"]
)
def test_what_is_no_data_uri_is_told_in_short(uri):
    with pytest.raises(DataError, match=r"^rows.csv:2: 'data:.*is no data URI") as caught:
        data_uri_content(uri + "A" * 1001, "rows.csv:2")
    assert len(str(caught.value)) < 250


def test_a_folder_that_cant_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"can't be written .*XDG_CACHE_HOME"):
        stored(b"x", "x", 10)
