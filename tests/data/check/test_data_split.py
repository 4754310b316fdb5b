import csv
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from cli import cli
from tiny import tiny_picture

import finetune
from finetune.common.errors import DataError
from finetune.data.check.split import SplitPlan, assigned

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def write(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(files: dict[str, Path]) -> dict[str, list[dict]]:
    found = {}
    for split, path in files.items():
        with path.open(newline="", encoding="utf-8") as file:
            found[split] = list(csv.DictReader(file))
    return found


@pytest.fixture
def table(tmp_path):
    chance = random.Random(0)
    labels = ["猫"] * 70 + ["狗"] * 23 + ["鸟"] * 7 + ["鱼"] * 3
    rows = [
        {"text": f'第{n}行, "引号"', "label": label, "who": f"p{chance.randrange(25)}"}
        for n, label in enumerate(labels)
    ]
    return write(tmp_path / "rows.csv", rows)


def test_every_row_is_in_one_split_as_it_was(table, tmp_path):
    splits = read(finetune.data_split(table, tmp_path / "out", SplitPlan(stratify="label")).files)
    rows = [row for split in splits.values() for row in split]
    assert sorted(row["text"] for row in rows) == sorted(row["text"] for row in read({"all": table})["all"])
    assert {split: len(found) for split, found in splits.items()} == {"train": 83, "validation": 10, "test": 10}
    for found in splits.values():  # in the file's order
        numbers = [int(row["text"].split("行")[0][1:]) for row in found]
        assert numbers == sorted(numbers)


def test_lines_within_cells_stay_in_their_cells(tmp_path):
    rows = [{"text": f"{number}{end}more", "label": "x"} for number, end in enumerate(["\r", "\n", "\r\n", "\r"])]
    splits = read(finetune.data_split(write(tmp_path / "rows.csv", rows), tmp_path / "out", SplitPlan()).files)
    assert sorted(row["text"] for split in splits.values() for row in split) == [row["text"] for row in rows]


def test_values_are_spread_to_within_a_row(table, tmp_path):
    splits = read(finetune.data_split(table, tmp_path / "out", SplitPlan(stratify="label")).files)
    total = Counter(row["label"] for row in read({"all": table})["all"])
    for split, found in splits.items():
        counts = Counter(row["label"] for row in found)
        most = 2 if split == "train" else 1  # training has what the two others leave
        assert all(abs(counts[label] - SHARES[split] * count) <= most for label, count in total.items()), (
            split,
            counts,
        )


def test_many_rare_values_do_not_all_go_to_training():
    labels = [str(number // 3) for number in range(300)]
    chosen = Counter(assigned([[f"row {n}"] for n in range(300)], labels, SHARES, 7))
    assert chosen == {"train": 240, "validation": 30, "test": 30}


def test_groups_do_not_cross(table, tmp_path):
    splits = read(finetune.data_split(table, tmp_path / "out", SplitPlan(group="who", stratify="label")).files)
    people = [{row["who"] for row in found} for found in splits.values()]
    assert sum(map(len, people)) == len(set.union(*people)) == 25 and len(people) == 3
    largest = max(Counter(row["who"] for row in read({"all": table})["all"]).values())
    for split, found in splits.items():
        assert abs(len(found) - SHARES[split] * 103) <= largest * 4  # a set for each value


def test_the_order_of_rows_is_of_no_matter_and_a_new_row_moves_few(table, tmp_path):
    rows = read({"all": table})["all"]

    def split_of(rows, name, seed=7):
        folder = tmp_path / name
        found = read(
            finetune.data_split(
                write(tmp_path / f"{name}.csv", rows), folder, SplitPlan(stratify="label", seed=seed)
            ).files
        )
        return {row["text"]: split for split, some in found.items() for row in some}

    first = split_of(rows, "first")
    assert split_of(rows[::-1], "reversed") == first
    more = split_of([*rows, *({"text": f"new {n}", "label": "猫", "who": "x"} for n in range(5))], "more")
    assert sum(more[text] != split for text, split in first.items()) <= 6
    other = split_of(rows, "other", seed=8)
    assert sum(other[text] != split for text, split in first.items()) > 15


def test_a_medium_is_never_on_two_sides_whatever_its_name(tmp_path):
    rows = []
    for number in range(40):
        tiny_picture((number, 0, 0)).save(tmp_path / f"{number}.png")
        shutil.copy(tmp_path / f"{number}.png", tmp_path / f"copy{number}.png")
        rows += [{"image": f"{number}.png", "label": "a"}, {"image": f"copy{number}.png", "label": "b"}]
    result = finetune.data_split(
        write(tmp_path / "rows.csv", rows), tmp_path / "out", SplitPlan(train=0.5, validation=0, test=0.5)
    )
    splits = read(result.files)
    shown = [{row["image"].removeprefix("copy") for row in found} for found in splits.values()]
    assert set(splits) == {"train", "test"} and not shown[0] & shown[1] and sum(map(len, shown)) == 40
    assert [len(found) for found in splits.values()] == [40, 40]
    assert result.media_folder == tmp_path.resolve()


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_stays_as_it_is(tmp_path, suffix):
    turns = [{"role": "assistant", "content": "好"}]
    rows = [{"messages": [{"role": "user", "content": f"问题 {n}"}, *turns], "id": n, "x": [1.5]} for n in range(30)]
    text = json.dumps(rows) if suffix == ".json" else "\n\n".join(map(json.dumps, rows))
    (tmp_path / f"rows{suffix}").write_text(text)
    result = finetune.data_split(tmp_path / f"rows{suffix}", tmp_path / "out")
    found = []
    for path in result.files.values():
        content = path.read_text(encoding="utf-8")
        assert path.suffix == suffix
        found += json.loads(content) if suffix == ".json" else [json.loads(line) for line in content.splitlines()]
    assert sorted(found, key=lambda row: row["id"]) == rows
    assert result.rows == {"train": 24, "validation": 3, "test": 3}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"train": 0.5}, "sum to 1"),
        ({"train": 1.2, "test": -0.3}, "from 0 to 1"),
        ({"group": "nobody"}, "'nobody' is empty or missing"),
    ],
)
def test_what_can_not_be_done_is_told(table, tmp_path, options, told):
    with pytest.raises(DataError, match=told):
        finetune.data_split(table, tmp_path / "out", SplitPlan(**options))


def test_rows_are_not_written_over_themselves(tmp_path):
    path = write(tmp_path / "train.csv", [{"text": str(n), "label": "a"} for n in range(10)])
    with pytest.raises(DataError, match="into="):
        finetune.data_split(path, tmp_path)
    assert len(read({"train": path})["train"]) == 10


def test_the_command_line(table, tmp_path):
    done = cli("data", "split", table, "--into", tmp_path / "out", "--group", "who")
    assert done.returncode == 0 and "split: validation" in done.stdout, done.stderr


def test_media_in_columns_of_any_name_and_tables_of_any_encoding(tmp_path):
    """The same pictures under Chinese headers, in GB 18030, in a folder of their own."""
    (tmp_path / "pictures").mkdir()
    for number in range(10):
        tiny_picture((20 * number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
    lines = ["帖子图,心情", *(f"{number % 10}.png,好{number}" for number in range(40))]
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="gb18030")
    given = {"media_folder": tmp_path / "pictures", "encoding": "gb18030"}
    shares = {"train": 0.6, "validation": 0, "test": 0.4}
    result = finetune.data_split(
        tmp_path / "rows.csv", tmp_path / "out", SplitPlan(**shares), media=["帖子图"], **given
    )
    assert result.media == result.sets == 10 and result.largest == 4
    shown = [{row["帖子图"] for row in rows} for rows in read(result.files).values()]
    assert not shown[0] & shown[1] and len(shown[0] | shown[1]) == 10
    with pytest.raises(DataError, match="no column '图'"):
        finetune.data_split(tmp_path / "rows.csv", tmp_path / "out", media=["图"], **given)
    assert finetune.data_split(tmp_path / "rows.csv", tmp_path / "blind", **given).media == 0
    lines = ["评论;心情", *(f"孩子特别喜欢，第{number}次买;好" for number in range(20))]
    (tmp_path / "semicolons.csv").write_text("\n".join(lines), encoding="gb18030")  # both are detected
    detected = finetune.data_split(tmp_path / "semicolons.csv", tmp_path / "detected")
    assert [*next(iter(read(detected.files).values()))[0]] == ["评论", "心情"]
