"""Some validation rows with the model's answers, as a table in the trackers that have tables."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL.Image import Image

from finetune.common.errors import MediaError
from finetune.data.media import decode
from finetune.data.media.audio import RATE
from finetune.data.predictions import Prediction
from finetune.data.rows import by_task
from finetune.data.sample import Answer, Sample
from finetune.evaluation.report.words import readable, shorten
from finetune.model.run import Run
from finetune.recipe.schema import Limits

ROWS = 8  # of all tasks; of each at least one
SIDE = 256  # pixels of a picture's longer side
SECONDS = 10  # of a recording
LONGEST = 1000  # characters of a text
KEY = "eval/answers"

Shown = Image | npt.NDArray[np.float32]


@dataclass(frozen=True)
class TrackedAnswer:
    """A row as trackers show it. `media`: the first of each kind; a picture or a video's first frame of at most `SIDE`
    pixels (RGB), or the first `SECONDS` of a recording, float32 (samples,) at 16 kHz.
    """

    row: str
    media: Mapping[str, Shown]
    question: str
    target: str
    answer: str = ""

    @property
    def texts(self) -> dict[str, str]:
        return {"row": self.row, "question": self.question, "target": self.target, "answer": self.answer}


class TrackedRows:
    """`ROWS` of the validation rows, the same in each pass, from all over those of each task."""

    def __init__(self, samples: Sequence[Sample], run: Run) -> None:
        self.samples, self.run = samples, run
        tasks = by_task(samples).values()
        most = max(1, ROWS // max(len(tasks), 1))
        self.numbers = [own[i] for own in tasks for i in sorted({part * len(own) // most for part in range(most)})]

    @cached_property
    def rows(self) -> list[TrackedAnswer]:
        """Without answers yet; media are decoded once."""
        return [self._row(self.samples[number]) for number in self.numbers]

    def answered(self, answers: Sequence[Answer]) -> list[TrackedAnswer]:
        """The rows with their answers, of which there is one for each sample."""
        texts = []
        for number in self.numbers:
            answer = answers[number]
            read = self.run.bindings[self.samples[number].task].task.read(answer)
            texts.append(shorten(answer.text if read is None else readable(read), LONGEST))
        return [replace(row, answer=text) for row, text in zip(self.rows, texts, strict=True)]

    def _row(self, sample: Sample) -> TrackedAnswer:
        one = Prediction.of(sample, self.run.bindings[sample.task].target(sample))
        question, target = shorten(one.question, LONGEST), shorten(readable(one.target), LONGEST)
        return TrackedAnswer(one.row, _shown(sample, self.run.recipe.media), question, target)


def _shown(sample: Sample, limits: Limits) -> dict[str, Shown]:
    shown: dict[str, Shown] = {}
    for medium in sample.media:
        if medium.kind in shown:
            continue
        first = {"count": 1} if medium.kind == "video" else {}
        try:
            decoded = decode(medium.kind, medium.path, where=medium.where, limits=limits, **first)
        except MediaError:  # its features were kept while it was readable
            continue
        if medium.kind == "audio":
            shown[medium.kind] = decoded[: SECONDS * RATE]
            continue
        picture = (decoded if medium.kind == "image" else decoded.frames[0]).copy()
        picture.thumbnail((SIDE, SIDE))
        shown[medium.kind] = picture
    return shown


def show_answers(track: Sequence[str], boards: Sequence[Any], rows: Sequence[TrackedAnswer], step: int) -> None:
    """Log the rows as a table in each tracker of `track`. `boards`: TensorBoard's callbacks; `step`: of the stage."""
    if not rows:
        return
    for board in boards:
        _tensorboard(board.tb_writer, rows, step)
    for tracker in track:
        if tracker in TABLES:
            TABLES[tracker](importlib.import_module(tracker), rows, step)


def _columns(rows: Sequence[TrackedAnswer], kinds: Sequence[str], cell: Callable[[Shown], Any]) -> dict[str, list[Any]]:
    """A column for each of these kinds of media that a row has, as `cell` shows one, between the row and its texts."""
    there = [kind for kind in kinds if any(kind in row.media for row in rows)]
    media = {kind: [cell(row.media[kind]) if kind in row.media else None for row in rows] for kind in there}
    texts = {name: [row.texts[name] for row in rows] for name in rows[0].texts}
    return {"row": texts.pop("row"), **media, **texts}


def _wandb(wandb: Any, rows: Sequence[TrackedAnswer], step: int) -> None:
    def cell(medium: Shown) -> Any:
        return wandb.Image(medium) if isinstance(medium, Image) else wandb.Audio(medium, sample_rate=RATE)

    columns = _columns(rows, ("image", "video", "audio"), cell)
    table = wandb.Table(columns=[*columns], data=[list(row) for row in zip(*columns.values(), strict=True)])
    wandb.log({KEY: table, "train/global_step": step})


def _trackio(trackio: Any, rows: Sequence[TrackedAnswer], step: int) -> None:
    if not hasattr(trackio, "Table"):
        return
    columns = _columns(rows, ("image", "video") if hasattr(trackio, "Image") else (), lambda one: trackio.Image(one))
    data = [list(row) for row in zip(*columns.values(), strict=True)]
    trackio.log({KEY: trackio.Table(columns=[*columns], data=data), "train/global_step": step})


def _mlflow(mlflow: Any, rows: Sequence[TrackedAnswer], step: int) -> None:
    mlflow.log_table({"step": [step] * len(rows), **_columns(rows, (), str)}, f"{KEY}.json")  # added to what is there


def _tensorboard(writer: Any, rows: Sequence[TrackedAnswer], step: int) -> None:
    """The table as Markdown; the media, which stay the same, beside the first one."""
    names = [*rows[0].texts]
    lines = [names, ["---"] * len(names), *(map(_markdown, row.texts.values()) for row in rows)]
    writer.add_text(KEY, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
    for row in rows if step == 0 else ():
        for kind, medium in row.media.items():
            if isinstance(medium, Image):
                writer.add_image(f"{KEY}/{kind}/{row.row}", np.asarray(medium), step, dataformats="HWC")
            else:
                writer.add_audio(f"{KEY}/{kind}/{row.row}", medium[None], step, sample_rate=RATE)


def _markdown(text: str) -> str:
    """Text as a cell shows it to the letter."""
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


TABLES: dict[str, Callable[[Any, Sequence[TrackedAnswer], int], None]] = {
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
