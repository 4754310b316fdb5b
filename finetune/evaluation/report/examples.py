"""The best and the worst predictions of each task, with their media small enough to lie in a page."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.common.errors import MediaError
from finetune.data.media import DECODERS, decode
from finetune.data.media.audio import RATE
from finetune.evaluation.report.words import confidence, said, shorten
from finetune.recipe.schema import Limits

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

SHOWN = 20  # best, and as many worst, of a task; fewer where there are many tasks
CARDS = 240  # of all tasks
MEDIA_BYTES = 5 * 2**20  # of all media, as they stand in the page
SIDE = 160  # pixels of a thumbnail's longer side
SECONDS = 15  # of a recording
MEDIA = 4  # of a prediction
ANSWERS = ("tuned", "base", "blank", "shuffled", "probe")


@dataclass(frozen=True)
class Shown:
    """A medium as a data URI; without one `note` says why."""

    kind: str
    name: str
    uri: str = ""
    note: str = ""


@dataclass
class Example:
    """`answers`: (condition, answer) of what the model said; `verdict`: "fits" where the tuned model's is the right one
    to the letter, "wrong" where it is text worth nothing, else ""; `more_media`: number of media that aren't shown."""

    task: str
    row: str
    side: str
    rank: int
    good: float
    question: str
    target: str
    verdict: str
    answers: list[tuple[str, str]]
    named: list[tuple[str, str]] = field(repr=False)
    media: list[Shown] = field(default_factory=list)
    more_media: int = 0

    @property
    def long(self) -> bool:
        """Whether its text needs the whole width."""
        return any(len(text) > 60 for text in (self.target, *(answer for _, answer in self.answers)))


@dataclass
class Album:
    """Media as data URIs, until there are `room` bytes of them. `left_out`: how many had no room; `broken`: how many
    can't be read any more.
    """

    limits: Limits
    room: int = MEDIA_BYTES
    left_out: int = 0
    broken: int = 0
    _made: dict[tuple[str, str], Shown] = field(default_factory=dict)

    def show(self, kind: str, path: str) -> Shown:
        """A thumbnail of a picture, or of a video's first frame; a recording's first seconds."""
        if (kind, path) not in self._made:
            self._made[kind, path] = self._show(kind, path)
        shown = self._made[kind, path]
        self.broken += bool(shown.note)
        if len(shown.uri) > self.room:
            self.left_out += 1
            return Shown(kind, shown.name, note="left out, to keep the page small")
        self.room -= len(shown.uri)
        return shown

    def _show(self, kind: str, path: str) -> Shown:
        name = shorten(Path(path).name, 120)
        if kind not in DECODERS:
            return Shown(kind, name, note=f"a medium of kind {shorten(kind, 40)!r} can't be shown")
        if not Path(path).is_file():
            return Shown(kind, name, note="the file isn't there any more")
        first_frame = {"per_second": 1 / (2 * self.limits.max_seconds)} if kind == "video" else {}
        try:
            decoded = decode(kind, Path(path), where=name, limits=self.limits, **first_frame)
        except MediaError as error:
            return Shown(kind, name, note=str(error))
        if kind == "audio":
            return Shown(kind, name, _uri("audio/ogg", sound(decoded)))
        return Shown(kind, name, _uri("image/webp", thumbnail(decoded if kind == "image" else decoded.frames[0])))


def thumbnail(picture: "Image") -> bytes:
    """WebP of a picture (RGB), at most SIDE pixels wide and high."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=75)
    return file.getvalue()


def sound(samples: "np.ndarray") -> bytes:
    """Ogg Vorbis of the first SECONDS of a recording: float32 (samples,) at 16 kHz."""
    import soundfile

    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", RATE, 1, format="OGG", subtype="VORBIS") as opened:
        for begin in range(0, min(len(samples), SECONDS * RATE), RATE):
            opened.write(samples[begin : min(begin + RATE, SECONDS * RATE)])
    return file.getvalue()


def examples(predictions: Sequence[Mapping[str, Any]], album: Album) -> list[Example]:
    """Of each task the worst predictions, then the best: by how good they are, then by how sure the model was, then by
    a hash of the row, so that equal ones come from all over the file. Rows that aren't scored are left out.
    """
    tasks: dict[str, list[Mapping[str, Any]]] = {}
    for row in predictions:
        if isinstance(row.get("good"), int | float):
            tasks.setdefault(str(row.get("task", "")), []).append(row)
    most = min(SHOWN, CARDS // (2 * max(len(tasks), 1)) or 1)
    found = [example for task, rows in tasks.items() for example in _of_task(task, rows, most)]
    for example in sorted(found, key=lambda example: example.rank):  # room is for all tasks and both sides
        example.media = [album.show(kind, path) for kind, path in example.named[:MEDIA]]
    return found


def _of_task(task: str, rows: Sequence[Mapping[str, Any]], most: int) -> list[Example]:
    def place(row: Mapping[str, Any]) -> str:
        return hashlib.sha256(str(row.get("row", "")).encode()).hexdigest()

    def sure(row: Mapping[str, Any]) -> float:
        return confidence(row.get("tuned")) or 0.0

    worst = sorted(rows, key=lambda row: (row["good"], -sure(row), place(row)))[: min(most, -(-len(rows) // 2))]
    there = {id(row) for row in worst}
    rest = [row for row in rows if id(row) not in there]
    best = sorted(rest, key=lambda row: (-row["good"], -sure(row), place(row)))[:most]
    return [
        _example(task, row, side, rank)
        for side, chosen in (("worst", worst), ("best", best))
        for rank, row in enumerate(chosen)
    ]


def _example(task: str, row: Mapping[str, Any], side: str, rank: int) -> Example:
    media = [str(path) for path in row.get("media") or []]
    kinds = [str(kind) for kind in row.get("kinds") or []]
    tuned = row.get("tuned")
    fits = said(tuned.get("label", tuned) if isinstance(tuned, dict) else tuned) == said(row.get("target"))
    return Example(
        task=task,
        row=shorten(str(row.get("row", "")), 120),
        side=side,
        rank=rank,
        good=float(row["good"]),
        question=shorten(str(row.get("question", "")), 800),
        target=shorten(said(row.get("target")), 400),
        verdict="fits" if fits else "wrong" if row["good"] <= 0 and isinstance(row.get("target"), str | list) else "",
        answers=[(name, shorten(said(row[name]), 400)) for name in ANSWERS if name in row],
        named=list(zip(kinds, media, strict=False)),
        more_media=max(0, len(media) - MEDIA),
    )


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
