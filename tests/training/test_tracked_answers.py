"""Validation rows with their answers in the trackers that have tables."""

import io
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_tracking import STAGES, recipe_of, tracker
from torch.utils.tensorboard import SummaryWriter

import finetune
from finetune.data.sample import Answer, Medium, Message, Sample
from finetune.recipe.schema import Limits
from finetune.training.tracked_answers import TABLES, TrackedAnswer, TrackedRows, show_answers

SOUND = np.zeros(16_000, np.float32)


def rows() -> list[TrackedAnswer]:
    picture = Image.new("RGB", (256, 100), "red")
    return [
        TrackedAnswer("rows.csv:2", {"image": picture}, "What | is\nit?", "*cat*", "<dog>"),
        TrackedAnswer("rows.csv:3", {"audio": SOUND}, "And this?", "cat", "cat"),
    ]


def events(folder: Any) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0, "audio": 0}).Reload()


def test_tensorboard_gets_a_table_each_pass_and_media_once(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (0, 5):
            show_answers(["tensorboard"], [SimpleNamespace(tb_writer=writer)], rows(), step)
    written = events(tmp_path)
    tables = written.Tensors("eval/answers/text_summary")
    assert [one.step for one in tables] == [0, 5]
    lines = tables[1].tensor_proto.string_val[0].decode().splitlines()
    assert lines[0] == "| row | question | target | answer |" and len(lines) == 4
    assert lines[2] == r"| rows.csv:2 | What \| is it? | \*cat\* | \<dog\> |"
    (picture,), (sound,) = (
        written.Images("eval/answers/image/rows.csv:2"),
        written.Audio("eval/answers/audio/rows.csv:3"),
    )
    assert Image.open(io.BytesIO(picture.encoded_image_string)).size == (256, 100)
    assert sound.sample_rate == 16_000 and picture.step == sound.step == 0


def table_of(module: MagicMock) -> list[dict[str, Any]]:
    arguments = module.Table.call_args.kwargs
    return [dict(zip(arguments["columns"], row, strict=True)) for row in arguments["data"]]


def test_other_trackers_get_tables_with_the_media_that_they_show():
    wandb, trackio, mlflow = (MagicMock() for _ in range(3))
    for name, module in {"wandb": wandb, "trackio": trackio, "mlflow": mlflow}.items():
        TABLES[name](module, rows(), 5)
    for module in (wandb, trackio):
        module.log.assert_called_once_with({"eval/answers": module.Table.return_value, "train/global_step": 5})
        first, second = table_of(module)
        assert first["image"] is module.Image.return_value and second["image"] is None
        assert (first["row"], first["target"], first["answer"]) == ("rows.csv:2", "*cat*", "<dog>")
    assert table_of(wandb)[1]["audio"] is wandb.Audio.return_value and "audio" not in table_of(trackio)[1]
    wandb.Audio.assert_called_once_with(SOUND, sample_rate=16_000)
    columns, file = mlflow.log_table.call_args.args
    assert file == "eval/answers.json" and columns["step"] == [5, 5] and columns["answer"] == ["<dog>", "cat"]
    old = MagicMock(spec=["log"])
    TABLES["trackio"](old, rows(), 5)
    old.log.assert_not_called()


@pytest.mark.parametrize(("counts", "expected"), [((40, 3), [4, 3]), ((20,), [8]), ((1,) * 12, [1] * 12)])
def test_rows_come_from_all_over_each_task_with_small_pictures(tmp_path, counts, expected):
    Image.new("RGB", (2000, 1000), "blue").save(tmp_path / "large.png")
    picture = Medium("image", tmp_path / "large.png")
    ask, answer = Message("user", (picture, "What is it?")), Message("assistant", ("a cat",))
    samples = [
        Sample((ask, answer), f"rows.csv:{i}", task=f"task{n}") for n, own in enumerate(counts) for i in range(own)
    ]
    task = SimpleNamespace(read=lambda given: given.text.upper())
    bindings = {f"task{n}": SimpleNamespace(task=task, target=lambda one: one.answer) for n in range(len(counts))}
    run: Any = SimpleNamespace(bindings=bindings, recipe=SimpleNamespace(media=Limits()))
    tracked = TrackedRows(samples, run)
    shown = tracked.answered([Answer(f"dog {i}") for i in range(len(samples))])
    by_task = [sum(samples[n].task == f"task{t}" for n in tracked.numbers) for t in range(len(counts))]
    assert by_task == expected
    assert [one.answer for one in shown] == [f"DOG {number}" for number in tracked.numbers]
    assert shown[0].media["image"].size == (256, 128) and shown[0].target == "a cat"
    assert counts != (20,) or tracked.numbers == [0, 2, 5, 7, 10, 12, 15, 17]


def test_a_stage_that_validates_shows_answers(tmp_path, monkeypatch):
    wandb = tracker("wandb", monkeypatch)
    run = finetune.train(recipe_of(tmp_path, "tensorboard", "wandb"), tmp_path / "run")
    for stage, logged in zip(STAGES, wandb.logged, strict=True):
        written = events(run.path / "tensorboard" / stage["name"])
        passes = [one.step for one in written.Scalars("eval/score")]
        assert [one.step for one in written.Tensors("eval/answers/text_summary")] == passes
        assert [step for step, values in logged.items() if "eval/answers" in values] == passes
        pictures = [tag for tag in written.Tags()["images"] if tag.startswith("eval/answers/image/")]
        assert 0 < len(pictures) <= 8
