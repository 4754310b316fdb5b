import base64
import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import part, tiny_dataset, tiny_picture, tiny_recipe
from tiny_formats import EXAMPLES, picture, put

import finetune
from finetune.common.errors import DataError
from finetune.data.rows import read_splits, sampling_weights, subset, summary
from finetune.data.sample import Message, Row, Sample
from finetune.recipe.schema import Source

SPLITS = ("train", "validation", "test")


def source(path: Path, task: str = "classify", **changes) -> Source:
    return Source(path=path, task=part("tasks", task), **changes)


def write(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label"], *rows])
    return path


@pytest.fixture
def data(tmp_path):
    return tiny_dataset(tmp_path / "data", train=40)


def test_rows_keep_their_order_and_weight(data):
    splits = read_splits([source(data / "train.csv", weight=2.5), source(data / "test.csv", split="test")], 0)
    assert [len(splits.of(name)) for name in SPLITS] == [40, 0, 8]
    assert {sample.weight for sample in splits.train} == {2.5}
    assert [sample.where for sample in splits.train[:2]] == ["train.csv:2", "train.csv:3"]
    assert summary(splits)["test"].answers == {"red": 2, "green": 2, "blue": 2, "yellow": 2}


def test_a_row_held_out_is_lost_to_training_and_depends_on_the_seed_alone(data):
    def test_rows(seed):
        splits = read_splits([source(data / "train.csv", hold_out=0.4)], seed)
        assert len(splits.train) + len(splits.test) == 40
        held_out = {sample.where for sample in splits.test}
        assert not held_out & {sample.where for sample in splits.train}
        return held_out

    assert test_rows(0) == test_rows(0) != test_rows(1)
    assert len(test_rows(0)) == 16


def test_rows_of_one_picture_stay_on_one_side(tmp_path):
    rows = []
    for number in range(30):
        tiny_picture((number, 10, 10)).save(tmp_path / f"{number}.png")
        (tmp_path / f"copy{number}.png").write_bytes((tmp_path / f"{number}.png").read_bytes())
        rows += [[f"{number}.png", "red"], [f"copy{number}.png", "blue"]]
    splits = read_splits([source(write(tmp_path / "rows.csv", rows), hold_out=0.5)], 0)
    pictures = {name: {s.media[0].path.read_bytes() for s in splits.of(name)} for name in ("train", "test")}
    assert pictures["train"] and pictures["test"] and not pictures["train"] & pictures["test"]


def test_rows_are_held_out_for_validation_beside_the_test(data):
    """More validation rows take none from the test, and every row stands on one side."""
    alone = read_splits([source(data / "train.csv", hold_out=0.3)], 1)
    both = read_splits([source(data / "train.csv", hold_out=0.3, hold_out_validation=0.3)], 1)
    where = {split: {sample.where for sample in both.of(split)} for split in SPLITS}
    assert where["test"] == {sample.where for sample in alone.test}
    assert where["validation"] and sum(map(len, where.values())) == len(set().union(*where.values())) == 40


def test_rows_of_a_group_are_held_out_together(data):
    lines = (data / "train.csv").read_text().splitlines()
    (data / "train.csv").write_text(
        "\n".join([lines[0] + ",patient", *(f"{line},p{number // 4}" for number, line in enumerate(lines[1:]))])
    )
    splits = read_splits([source(data / "train.csv", hold_out=0.3, hold_out_validation=0.2, group="patient")], 0)
    sides = {split: {(int(s.where.split(":")[1]) - 2) // 4 for s in splits.of(split)} for split in SPLITS}
    assert all(sides.values()) and sum(map(len, sides.values())) == 10
    with pytest.raises(DataError, match="group names 'doctor'; the file has no such column"):
        read_splits([source(data / "train.csv", hold_out=0.3, group="doctor")], 0)


def test_a_wrong_group_is_one_fault_with_the_column_that_is_meant(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("Pat. No,question,answer\n" + "".join(f"{n % 9},q{n},a\n" for n in range(150)))
    rows = Source(path=path, task=part("tasks", "answer", media=()), hold_out=0.2, group="Pat No")
    with pytest.raises(DataError) as error:
        read_splits([rows], 0)
    assert "here and in 149 of 149 other rows no column 'Pat No'" in str(error.value)
    assert "group names 'Pat No'; the file has 'Pat. No': did you mean that?" in str(error.value)
    assert str(error.value).count("rows.csv:") == 1


def test_fields_in_columns_need_no_json_column(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("scan,total,paid\nbill 1,3,yes\n")
    task = part("tasks", "extract", media=(), text="scan", fields={"total": "number", "paid": "text"})
    with pytest.raises(DataError, match="write `answer: ''` in the task"):
        read_splits([Source(path=path, task=task)], 0)


def sample(source: int, weight: float = 1.0, group: str = "") -> Sample:
    turns = (Message("user", ("a",)), Message("assistant", ("b",)))
    return Sample(turns, "rows.csv:2", group=group, source=source, weight=weight)


def test_a_temperature_lifts_small_sources_and_keeps_the_sum():
    samples = [sample(0)] * 900 + [sample(1)] * 100
    assert [*sampling_weights(samples, 1.0)] == [1.0] * 1000
    weights = sampling_weights(samples, 2.0)
    assert sum(weights) == pytest.approx(1000)
    assert 900 * weights[0] / (100 * weights[-1]) == pytest.approx(3.0)  # sqrt(900) : sqrt(100)
    hot = sampling_weights(samples, 1e9)
    assert 900 * hot[0] == pytest.approx(100 * hot[-1], rel=1e-6)
    weighed = sampling_weights([sample(0, 2.0)] * 50 + [sample(1)] * 100, 3.0)
    assert weighed == pytest.approx([2.0] * 50 + [1.0] * 100)  # as many rows already


def test_a_limit_takes_whole_groups(data):
    samples = [sample(0, group=f"g{number // 4}") for number in range(40)]
    chosen = [number for number, one in enumerate(samples) if any(one is other for other in subset(samples, 10, 0))]
    assert len(chosen) == 8 and len({number // 4 for number in chosen}) == 2
    assert len(subset([sample(0) for _ in range(40)], 10, 0)) == 10 and len(subset(samples, 2, 0)) == 2


def test_a_row_of_training_under_another_name_in_the_test_is_refused(data):
    picture = data / "images" / "renamed.png"
    picture.write_bytes((data / "images" / "train0.png").read_bytes())
    test = write(data / "other.csv", [["images/test1.png", "green"], ["images/renamed.png", "red"]])
    with pytest.raises(DataError, match=r"1 row is both in training and in test:\n  train.csv:2 is also other.csv:3"):
        read_splits([source(data / "train.csv"), source(test, split="test")], 0)


def test_all_wrong_rows_are_counted_and_twenty_are_shown(tmp_path):
    tiny_picture().save(tmp_path / "a.png")
    rows = [
        ["a.png", "red"],
        *[[f"missing{number}.png", "red"] for number in range(21)],
        ["a.png", ""],
        ["../a.png", "red"],
    ]
    with pytest.raises(DataError) as caught:
        read_splits([source(write(tmp_path / "rows.csv", rows))], 0)
    lines = str(caught.value).splitlines()
    assert "23 of 24 rows can't be used" in lines[0] and lines[-2].strip() == "... and 3 more"
    assert "rows.csv:3: no such image" in lines[1] and len(lines) == 23
    assert "finetune data check RECIPE" in lines[-1]


def refused(*sources: Source) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_splits(sources, 0)
    return str(caught.value).splitlines()


def test_the_faults_of_every_file_are_shown_with_the_rows_own_ids(tmp_path):
    tiny_picture().save(tmp_path / "a.png")
    (tmp_path / "first.csv").write_text("image,label,id\na.png,red,r1\ngone.png,red,r2\na.png,red,r3,more\n,red,r4\n")
    second = [
        {"id": "x7", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]},
        {"id": "x8", "image": "a.png", "conversations": [{"from": "robot", "value": "<image>"}]},
    ]
    (tmp_path / "second.json").write_text(json.dumps(second))
    lines = refused(source(tmp_path / "first.csv"), source(tmp_path / "second.json", "chat"))
    assert "3 of 4 rows" in lines[0] and "2 of 2 rows" in lines[0]
    text = "\n".join(lines)
    for place in ("first.csv:3 (id 'r2'): no such", "first.csv:4:", "first.csv:5 (id 'r4'):", "(id 'x7')", "(id 'x8')"):
        assert place in text, (place, text)


def test_a_missing_column_is_one_line_with_all_that_are_missing_and_the_likely_ones(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("images,labels,note\n" + "a.png,red,x\n" * 160)
    lines = refused(source(path))
    assert len(lines) == 2 and "in 159 of 159 other rows no column 'label' or 'image'" in lines[0]
    assert "`columns: {label: labels, image: images}`" in lines[0]


@pytest.mark.parametrize(
    ("content", "proposed"),
    [
        ("picture,shelf\nlow/a.PNG,red\n", "{label: shelf, image: picture}"),
        ("id,shelf,picture\n1,red,https://a.org/b.jpg?size=9\n", "{label: shelf, image: picture}"),
        ("a,b,picture\n1,red,b.jpg\n", "{label: ..., image: picture}"),
        ("image,shelf\nb.jpg,red\n", "{label: shelf}"),
        ("imagery,picture,label\nsummer,b.jpg,red\n", "{image: picture}"),
        ("question,sound\nWhat?,b.wav\n", "{label: ..., image: ...}"),
    ],
)
def test_a_missing_column_is_proposed_by_what_columns_hold(tmp_path, content, proposed):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    assert f"with `columns: {proposed}`" in refused(source(path))[0]


def test_the_check_of_the_data_is_proposed_for_the_recipes_own_file(tmp_path):
    (tmp_path / "my data").mkdir()
    recipe = tiny_recipe(tmp_path / "my data")
    rows = tmp_path / "my data" / "data" / "train.csv"
    rows.write_text(rows.read_text().replace("image", "photo", 1))
    for loaded in (finetune.load_recipe(recipe), finetune.load_recipe(recipe).with_("seed=3")):
        with pytest.raises(DataError, match=f"`finetune data check '{recipe}'` examines all rows"):
            finetune.check(loaded)
    built = finetune.Recipe(**finetune.load_recipe(recipe).model_dump(mode="json", exclude_unset=True))
    assert built == finetune.load_recipe(recipe) and built.file is None
    with pytest.raises(DataError, match="`finetune data check RECIPE` examines all rows"):
        finetune.check(built)


def test_a_map_of_columns_the_wrong_way_round_is_turned(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("file,label\na.png,red\n")
    lines = refused(source(path, columns={"file": "image"}))
    assert "the wrong way round, write `columns: {image: file}`" in lines[0]


def test_a_column_that_is_named_otherwise_in_the_file_is_not_asked_for_again(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("Foto,kind\na.png,red\n")
    (line, _) = refused(source(path, columns={"image": "foto", "label": "kind"}))
    assert "columns.image names 'foto'; the file has 'Foto': did you mean that?" in line and "say which" not in line
    (line, _) = refused(source(path, columns={"image": "foto"}))
    assert "did you mean that?; say which it is with `columns: {label: kind}`" in line


def test_a_wrong_cell_is_named_by_the_files_own_column(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("Foto,label\n,red\n")
    assert (
        "rows.csv:2: column 'Foto' (the task's 'image') holds ''" in refused(source(path, columns={"image": "Foto"}))[0]
    )


def test_faults_of_two_sources_of_one_file_name_the_source(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("image,label,other\na.png,red,x\n")
    tiny_picture().save(tmp_path / "a.png")
    lines = refused(source(path), source(path, columns={"image": "other"}))
    assert lines[0].startswith("data.1: rows.csv:2: no such image")


def test_an_empty_file_is_a_fault_like_a_missing_one(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("image,label\na.png,red\n")
    (tmp_path / "a.png").touch()
    assert "rows.csv:2: image of 0 bytes: " in refused(source(path))[0]


def test_the_column_of_a_json_object_is_an_option(tmp_path):
    tiny_picture().save(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text("image,total\na.png,3\n")
    assert "`answer: COLUMN`" in refused(source(tmp_path / "rows.csv", "extract"))[0]


@pytest.mark.parametrize(
    "row, message",
    [(["a.png", " "], "column 'label' holds ' '"), (["../a.png", "red"], "outside"), (["", "red"], "'image'")],
)
def test_a_wrong_row_says_what_and_where(row, message, tmp_path):
    (tmp_path / "data").mkdir()
    for folder in (tmp_path, tmp_path / "data"):
        tiny_picture().save(folder / "a.png")
    with pytest.raises(DataError, match=f"rows.csv:2: .*{message}"):
        read_splits([source(write(tmp_path / "data" / "rows.csv", [row]))], 0)


def test_columns_are_renamed(tmp_path):
    tiny_picture().save(tmp_path / "a.png")
    (tmp_path / "rows.tsv").write_text("file\tcolour\na.png\tred\n")
    rows = source(tmp_path / "rows.tsv", columns={"image": "file", "label": "colour"})
    assert read_splits([rows], 0).train[0].answer == "red"


def test_a_file_of_no_known_format_is_named(tmp_path):
    (tmp_path / "rows.xyz").write_text("a")
    with pytest.raises(DataError, match=r"rows.xyz: no format recognises it; .*messages, sharegpt, table"):
        read_splits([source(tmp_path / "rows.xyz")], 0)


def test_addresses_links_and_semicolons_are_reported(tmp_path):
    (tmp_path / "outside").mkdir()
    tiny_picture().save(tmp_path / "outside" / "a.png")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match=r"'https://example\.com/a\.png' is an address of a host that `hosts`"):
        read_splits([source(write(folder / "one.csv", [["https://example.com/a.png", "red"]]))], 0)
    with pytest.raises(DataError, match=r"'link/a.png' leads to .*outside/a.png, outside "):
        read_splits([source(write(folder / "two.csv", [["link/a.png", "red"]]))], 0)
    (folder / "three.csv").write_text("image;label\na.png;red\n")
    with pytest.raises(DataError, match=r"three\.csv:1: fields stand between semicolons"):
        read_splits([source(folder / "three.csv")], 0)


def row(folder: Path, value: Any, **access) -> Row:
    return Row(folder / "rows.csv", 2, {"image": value}, folder, **access)


def test_a_medium_is_named_or_held_in_many_ways(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = picture()
    file = put(tmp_path / "data" / "a.png", content)
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    values = ["a.png", content, {"bytes": content, "path": "x.png"}, {"bytes": None, "path": "a.png"}, uri, Path(file)]
    for value in values:
        (medium,) = row(tmp_path / "data", value).media(("image",))
        assert medium.kind == "image" and medium.path.read_bytes() == content and medium.path.is_file()
    assert len(row(tmp_path / "data", values).media(("image",))) == len(values)
    with pytest.raises(DataError, match=r"rows.csv:2: holds a medium of .* bytes; 1 to 10 "):
        row(tmp_path / "data", content, max_bytes=10).media(("image",))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "column 'image' holds None"),
        ({"url": "a.png"}, "column 'image' holds .*; write a path"),
        ({"bytes": None, "path": None}, "column 'image' holds"),
        ([["a.png"]], "column 'image' holds"),
        (["a.png", None], "column 'image' holds 'None'"),
        ("a" * 5000, "column 'image' holds 'aaa.*no path"),
        ("a\0.png", "column 'image' holds .*no path"),
        ("a\udcff.png", "column 'image' holds .*no path"),  # a name that isn't UTF-8
        ("images\\a.png", "no such image: .*; write / between folders"),
        ("", "column 'image' holds ''"),
        (".", "no such image"),
    ],
)
def test_what_names_no_medium_is_a_data_error(value, message, tmp_path):
    put(tmp_path / "a.png", picture())
    with pytest.raises(DataError, match=f"rows.csv:2: {message}"):
        row(tmp_path, value).media(("image",))


def test_media_outside_their_folder_are_read_where_the_recipe_says_so(tmp_path):
    (tmp_path / "data").mkdir()
    file = put(tmp_path / "a.png", picture())
    for name in ("../a.png", str(file)):
        with pytest.raises(DataError, match=r"outside_media_folder: true"):
            row(tmp_path / "data", name).media(("image",))
        assert row(tmp_path / "data", name, outside_media_folder=True).media(("image",))[0].path == file


def test_media_are_fetched_from_the_hosts_of_a_source_alone(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("finetune.data.sample.fetched", lambda *arguments: calls.append(arguments) or tmp_path)
    media = row(tmp_path, "https://example.com/a.png", hosts=("example.com",), max_bytes=7).media(("image",))
    assert media[0].path == tmp_path
    assert calls == [("https://example.com/a.png", ("example.com",), "rows.csv:2", 7)]


@pytest.mark.parametrize(("value", "text"), [(3, "3"), (2.5, "2.5"), (" a ", "a"), (True, "true")])
def test_numbers_and_booleans_are_text(value, text, tmp_path):
    assert Row(tmp_path, 1, {"label": value}, tmp_path).text("label") == text
    for wrong in (float("nan"), None, ["a"], ""):
        with pytest.raises(DataError, match="column 'label' holds"):
            Row(tmp_path, 1, {"label": wrong}, tmp_path).text("label")


@pytest.mark.parametrize(
    ("example", "task", "renamed", "answers"),
    [
        ("table", "classify", {}, ["red", "rot, 红"]),
        ("sheet", "classify", {"label": "price"}, ["3", "2.5"]),
        ("folders", "classify", {}, ["cats", "cats", "dogs"]),
        ("messages", "chat", {}, ["red"]),
        ("llava", "chat", {}, ["red"]),
        ("sharegpt", "chat", {}, ["That."]),
        ("coco", "caption", {}, ["A cat.", "One cat."]),
        ("saved", "classify", {"label": "text"}, ["x", "y"]),
        ("parquet", "classify", {}, ["blue", "red"]),
        ("common_voice", "transcribe", {"text": "age"}, ["twenties"]),
        ("ljspeech", "transcribe", {"text": "normalized"}, ["Doctor No, three"]),
        ("kaldi", "transcribe", {}, ["你好 world"]),
    ],
)
def test_every_format_becomes_samples(example, task, renamed, answers, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = EXAMPLES[example][1](tmp_path / "data")
    samples = read_splits([source(path, task, columns=renamed)], 0).train
    assert [sample.answer for sample in samples] == answers
    assert all(len(sample.media) == (example != "sharegpt") for sample in samples)


def test_rows_of_a_tar_become_samples(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = EXAMPLES["webdataset"][1](tmp_path / "data")
    first = read_splits([source(path / "0.tar")], 0).train[0]
    assert first.answer == "3" and first.media[0].path.read_bytes() == picture() and first.where == "0.tar:1"
