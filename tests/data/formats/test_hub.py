import json
import subprocess
import sys

import datasets
import pyarrow as pa
import pytest
import tiny_formats
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Image, List, Value, Video
from pyarrow import parquet
from tiny import part
from tiny_formats import picture, put, sound

from finetune.common.errors import DataError
from finetune.data.formats import hub
from finetune.data.read import read_rows
from finetune.data.rows import read_splits
from finetune.recipe.schema import RowFile, Source

HELD = {"bytes": picture(), "path": None}


def read(path, **options):
    return [row for _, row in hub.rows(path, hub.Options(**options))]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache" / "datasets"))


def stored(rows: list[dict], features: Features) -> pa.Table:
    """Rows as arrow has them: `datasets` would decode sound, and read the files that are named, to write them."""
    return pa.Table.from_pylist(rows, schema=features.arrow_schema)


def everything() -> pa.Table:
    labels = ClassLabel(names=["red", "blue"])
    features = Features(
        {
            "image": Image(),
            "images": List(Image()),
            "audio": Audio(),
            "video": Video(),
            "label": labels,
            "labels": List(labels),
            "inside": {"image": Image(), "n": Value("int64")},
        }
    )
    row = {
        "image": HELD,
        "images": [HELD, HELD],
        "audio": {"bytes": sound(), "path": "a.wav"},
        "video": {"bytes": b"v", "path": None},
        "label": 1,
        "labels": [0, 1],
        "inside": {"image": HELD, "n": 3},
    }
    return stored([row] * 20, features)


def expected() -> dict:
    return {
        "image": HELD,
        "images": [HELD, HELD],
        "audio": {"bytes": sound(), "path": "a.wav"},
        "video": {"bytes": b"v", "path": None},
        "label": "blue",
        "labels": ["red", "blue"],
        "inside": {"image": HELD, "n": 3},
    }


def test_media_stay_as_they_are_stored_and_labels_get_names(tmp_path):
    Dataset(everything()).save_to_disk(tmp_path / "saved")
    parquet.write_table(everything(), tmp_path / "rows.parquet")
    assert hub.detects(tmp_path / "saved") and hub.detects(tmp_path / "rows.parquet")
    assert read(tmp_path / "saved") == read(tmp_path / "rows.parquet") == [expected()] * 20


def test_a_shuffled_dataset_is_read_in_its_own_order(tmp_path):
    rows = Dataset.from_dict({"n": list(range(50))}).shuffle(seed=1)
    rows.save_to_disk(tmp_path / "saved")
    assert [row["n"] for row in read(tmp_path / "saved")] == rows["n"][:]


def test_one_split_is_read(tmp_path):
    both = {name: Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    DatasetDict(both).save_to_disk(tmp_path / "saved")
    assert (
        read(tmp_path / "saved") == [{"text": "train"}] and read(tmp_path / "saved", split="test")[0]["text"] == "test"
    )
    with pytest.raises(DataError, match=r"no split 'dev'; `format.split` is one of train, test"):
        read(tmp_path / "saved", split="dev")
    DatasetDict({"dev": both["test"]}).save_to_disk(tmp_path / "only")
    assert read(tmp_path / "only") == [{"text": "test"}]
    for name in ("train", "test"):
        (tmp_path / "files" / "data").mkdir(parents=True, exist_ok=True)
        both[name].to_parquet(tmp_path / "files" / "data" / f"{name}-00000-of-00001.parquet")
    assert hub.detects(tmp_path / "files")
    for split in (None, "train", "test"):
        assert read(tmp_path / "files", split=split) == [{"text": split or "train"}]
    assert read(tmp_path / "files", split="test[:1]") == [{"text": "test"}]


def test_rows_become_samples_whose_media_are_files(tmp_path):
    path = tiny_formats.saved(tmp_path)
    samples = read_splits([Source(path=path, task=part("tasks", "classify"))], 0).train
    assert [sample.answer for sample in samples] == ["blue", "red"]
    media = samples[0].media[0]
    assert media.path.read_bytes() == picture() and media.path.is_relative_to(tmp_path / "cache")


def test_conversations_take_the_pictures_beside_them(tmp_path):
    turn = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "red"}]
    features = Features(
        {"messages": List({"role": Value("string"), "content": Value("string")}), "images": List(Image())}
    )
    Dataset.from_list([{"messages": turn, "images": [HELD]}], features).save_to_disk(tmp_path / "saved")
    (sample,) = read_splits([Source(path=tmp_path / "saved", task=part("tasks", "chat"))], 0).train
    assert sample.media[0].path.read_bytes() == picture()


def named(name: str, path):
    """A row that names its picture."""
    parquet.write_table(stored([{"image": {"bytes": None, "path": name}}], Features({"image": Image()})), path)
    return path


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret.png", "file:///etc/hostname", "zip://a::/etc/hostname"])
def test_a_dataset_reads_no_file_of_this_machine_by_naming_it(name, tmp_path):
    put(tmp_path / "secret.png", picture())
    (tmp_path / "data").mkdir()
    (row,) = read_rows(RowFile(path=named(name, tmp_path / "data" / "d.parquet")))
    with pytest.raises(DataError, match=r"d.parquet:1: .*(outside|not of http|no address)"):
        row.media(("image",))


def test_files_that_datasets_itself_cached_are_read_where_they_are(tmp_path):
    file = put(tmp_path / "cache" / "datasets" / "a.png", picture())
    (row,) = read_rows(RowFile(path=named(str(file), tmp_path / "d.parquet")))
    assert row.media(("image",))[0].path == file
    named(str(file.parent / ".." / ".." / "a.png"), tmp_path / "d.parquet")
    assert isinstance(read(tmp_path / "d.parquet")[0]["image"], str)


def test_a_file_of_the_repository_is_read_through_the_hub(tmp_path):
    import fsspec

    class Hub(fsspec.get_filesystem_class("memory")):
        protocol = "hf"
        store = {}  # noqa: RUF012 - shared by all who open it

    fsspec.register_implementation("hf", Hub, clobber=True)
    try:
        with fsspec.open("hf://datasets/me/mine/a.png", "wb") as file:
            file.write(picture())
        assert read(named("hf://datasets/me/mine/a.png", tmp_path / "d.parquet"))[0]["image"]["bytes"] == picture()
    finally:
        from huggingface_hub import HfFileSystem

        fsspec.register_implementation("hf", HfFileSystem, clobber=True)


@pytest.mark.parametrize(("name", "message"), [("me/not-there", "is the id right"), ("a b/c d", "is the id right")])
def test_an_id_that_leads_nowhere_is_a_data_error(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"^{name}: can't be read by datasets .*{message}"):
        read(hub.Path(name), streaming=True)


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing"])
def test_a_broken_file_is_a_data_error(content, tmp_path):
    with pytest.raises(DataError, match=r"rows.parquet: can't be read by datasets"):
        read(put(tmp_path / "rows.parquet", content))


def test_a_file_has_one_split_and_may_be_left_early(tmp_path):
    """Left early, nothing of arrow may abort the process at its end."""
    parquet.write_table(everything(), tmp_path / "rows.parquet", row_group_size=2)
    with pytest.raises(DataError, match=r"Bad split: test"):
        read(tmp_path / "rows.parquet", split="test")
    code = (
        "from pathlib import Path\nfrom finetune.data.formats import hub\n"
        f"rows = hub.rows(Path({str(tmp_path / 'rows.parquet')!r}), hub.Options())\nnext(rows)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_code_beside_the_rows_is_not_run(tmp_path):
    path = tiny_formats.parquet(tmp_path / "files")
    put(path / "files.py", f"open({json.dumps(str(tmp_path / 'hacked'))}, 'w')")
    with pytest.raises(DataError, match="scripts are no longer supported"):
        read(path)
    assert not (tmp_path / "hacked").exists()
