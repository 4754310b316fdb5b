"""Pairs and labelled answers in the forms of trl, LLaMA-Factory, ShareGPT and our own become the same samples."""

import csv
import json
from pathlib import Path

import pytest
from tiny import part, tiny_picture, tiny_recipe

import finetune
from finetune.common.errors import DataError
from finetune.data.read import read_rows
from finetune.data.rows import read_splits
from finetune.data.sample import Medium
from finetune.recipe.schema import RowFile, Source

IMAGE = {"type": "image", "image": "a.png"}
WHAT = {"type": "text", "text": "What?"}
USER = {"role": "user", "content": [IMAGE, WHAT]}
QUESTION = {"role": "user", "content": "What?"}


def says(text):
    return {"role": "assistant", "content": text}


def samples_of(folder: Path, rows, task="chat", **options):
    tiny_picture().save(folder / "a.png")
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(path=file, task=part("tasks", task, **options))
    return list(read_splits([source], seed=0).train)


PAIRS = {
    "messages and texts": {"messages": [USER], "chosen": "A cat.", "rejected": "A dog."},
    "messages with the answer": {"messages": [USER, says("A cat.")], "rejected": "A dog."},
    "messages and turns": {"messages": [USER], "chosen": says("A cat."), "rejected": says("A dog.")},
    "trl, explicit": {"prompt": [USER], "chosen": [says("A cat.")], "rejected": [says("A dog.")]},
    "trl, implicit": {"chosen": [USER, says("A cat.")], "rejected": [USER, says("A dog.")]},
    "trl, explicit and whole": {"prompt": [USER], "chosen": [USER, says("A cat.")], "rejected": [USER, says("A dog.")]},
    "trl, images beside": {
        "images": ["a.png"],
        "prompt": [{"role": "user", "content": [{"type": "image"}, WHAT]}],
        "chosen": [says("A cat.")],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}],
    },
    "trl, images without a place": {
        "images": ["a.png"],
        "prompt": [QUESTION],
        "chosen": [says("A cat.")],
        "rejected": [says("A dog.")],
    },
    "trl, plain text": {"image": "a.png", "prompt": "What?", "chosen": "A cat.", "rejected": "A dog."},
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "<image>What?"}],
        "chosen": {"from": "gpt", "value": "A cat."},
        "rejected": {"from": "gpt", "value": "A dog."},
        "images": ["a.png"],
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_in_any_form(name, tmp_path):
    (sample,) = samples_of(tmp_path, [PAIRS[name]])
    assert [message.role for message in sample.messages] == ["user", "assistant"]
    assert sample.question[0].content == (Medium("image", tmp_path / "a.png"), "What?")
    assert (sample.answer, sample.rejected, sample.desirable) == ("A cat.", "A dog.", None)


VERDICTS = {
    "own": {"messages": [USER, says("A cat.")], "desirable": True},
    "trl": {"prompt": [USER], "completion": [says("A cat.")], "label": True},
    "trl, plain text": {"image": "a.png", "prompt": "What?", "completion": "A cat.", "label": True},
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}],
        "images": ["a.png"],
        "kto_tag": True,
    },
}


@pytest.mark.parametrize("name", VERDICTS)
def test_a_label_in_any_form(name, tmp_path):
    bad = {key: False if value is True else value for key, value in VERDICTS[name].items()}
    good, bad = samples_of(tmp_path, [VERDICTS[name], bad])
    assert good.messages == bad.messages and good.question[0].content[1] == "What?" and good.answer == "A cat."
    assert (good.desirable, bad.desirable) == (True, False) and good.rejected is None


@pytest.mark.parametrize(
    "task, columns, answer, rejected",
    [
        ("answer", {"question": "What?", "answer": "cat", "rejected": "dog"}, "cat", "dog"),
        ("answer", {"question": "What?", "chosen": "cat", "rejected": "dog"}, "cat", "dog"),
        ("vqa", {"question": "What?", "chosen": "cat", "rejected": "dog"}, "cat", "dog"),
        ("caption", {"chosen": "a cat", "rejected": "a dog"}, "a cat", "a dog"),
        ("classify", {"label": "cat", "rejected": "dog"}, "cat", "dog"),
        ("chat", {"prompt": "What?", "chosen": "cat", "rejected": "dog"}, "cat", "dog"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_rows_of_tasks_have_a_rejected_column(task, columns, answer, rejected, suffix, tmp_path):
    tiny_picture().save(tmp_path / "a.png")
    row, file = {"image": "a.png", **columns}, tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        with file.open("w", newline="") as writing:
            csv.writer(writing).writerows([row, row.values()])
    else:
        file.write_text(json.dumps(row))
    (sample,) = read_splits([Source(path=file, task=part("tasks", task))], seed=0).train
    assert (sample.answer, sample.rejected) == (answer, rejected) and len(sample.media) == 1


def test_rows_without_preferences_stay_as_they_were(tmp_path):
    row = {"prompt": "What?", "label": True, "rejected": None, "answer": "cat", "image": "a.png"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (read,) = read_rows(RowFile(path=tmp_path / "rows.jsonl"), 2**20)
    assert read.columns == row


@pytest.mark.parametrize(
    "row, expected",
    [
        (
            {"chosen": [USER, says("A cat.")], "rejected": [QUESTION, says("A dog.")]},
            r"rows.jsonl:1: the questions of 'chosen' and 'rejected' differ, media in one of them only; both must",
        ),
        (
            {
                "prompt": [QUESTION],
                "chosen": [says("A")],
                "rejected": [{"role": "assistant", "content": [IMAGE, WHAT]}],
            },
            r"rows.jsonl:1: 'rejected' holds image: media belong in the question",
        ),
        ({"prompt": [QUESTION], "chosen": [says("A")], "rejected": [QUESTION]}, r"'rejected' is a turn of 'user'"),
        ({"prompt": [QUESTION], "chosen": [says("A"), QUESTION], "rejected": "x"}, r"'chosen' holds 2 turns"),
        ({"messages": [QUESTION, says("A")], "chosen": "B", "rejected": "C"}, r"end with the assistant's turn, beside"),
        ({"messages": [QUESTION], "chosen": 3, "rejected": "C"}, r"'chosen' holds '3'"),
    ],
)
def test_a_pair_that_is_none_is_refused_with_its_row(row, expected, tmp_path):
    with pytest.raises(DataError, match=expected):
        samples_of(tmp_path, [row])


def test_all_such_rows_are_named_at_once(tmp_path):
    wrong = {"chosen": [USER, says("A cat.")], "rejected": [QUESTION, says("A dog.")]}
    with pytest.raises(DataError) as caught:
        samples_of(tmp_path, [wrong, PAIRS["trl, explicit"], *[wrong] * 24])
    (line, _) = str(caught.value).splitlines()
    assert line.startswith("rows.jsonl:1: ") and "media in one of them only" in line
    assert line.endswith(f"; so in 24 other rows: {', '.join(map(str, range(3, 22)))} and 5 more")


def test_a_mistyped_column_of_chosen_turns_is_named(tmp_path):
    row = dict(PAIRS["trl, explicit"])
    row["choosen"] = row.pop("chosen")
    with pytest.raises(DataError, match=r"'rejected' without 'chosen' .*; is 'choosen' meant"):
        samples_of(tmp_path, [row])


def test_rows_with_chosen_answers_are_checked_as_they_train(tmp_path):
    tiny_recipe(tmp_path)
    data = []
    for split in ("train", "test"):
        file = tmp_path / "data" / f"{split}.jsonl"
        row = {"image": f"images/{split}0.png", "question": f"What {split}?", "chosen": "A cat.", "rejected": "A dog."}
        file.write_text(json.dumps(row))
        data.append({"path": str(file), "task": "answer", "split": split})
    found = finetune.data_check(finetune.load_recipe(tiny_recipe(tmp_path, data=data)), out=tmp_path / "checked")
    assert found.errors == 0
