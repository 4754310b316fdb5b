"""The best and the worst predictions of each task, with their media small enough to be embedded in a page."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.common.errors import MediaError
from finetune.data.check.page import picture_uri, sound_uri
from finetune.data.media import DECODERS, decode
from finetune.data.predictions import Prediction
from finetune.data.sample import Medium
from finetune.evaluation.report.words import confidence, label_of, readable, shorten
from finetune.recipe.schema import Limits

PER_SIDE = 20  # best, and as many worst, of a task; fewer if there are many tasks
MAX_EXAMPLES = 240  # of all tasks
MEDIA_BYTES = 5 * 2**20  # of all media, as embedded
THUMBNAIL = 240  # pixels of a thumbnail's longer side
SECONDS = 15  # of a recording
MEDIA = 4  # of a prediction
ANSWERS = ("tuned", "base", "blank", "shuffled", "probe")

Side = Literal["worst", "best"]


@dataclass(frozen=True)
class AlbumMedium:
    """A medium as a data URI; without one, `note` says why."""

    kind: str
    name: str
    uri: str = ""
    note: str = ""


@dataclass(frozen=True)
class DrawnBox:
    """A box on a picture, in percent of its width and height; `kind`: the target's or the tuned answer's."""

    kind: Literal["target", "tuned"]
    left: float
    top: float
    width: float
    height: float


@dataclass
class Example:
    """A prediction on the worst or the best side; `group`: what is on this side; `rank`: its place there, from 0."""

    prediction: Prediction
    side: Side
    group: str
    rank: int
    media: list[AlbumMedium] = field(default_factory=list)

    @property
    def task(self) -> str:
        return self.prediction.task

    @property
    def row(self) -> str:
        return shorten(self.prediction.row, 120)

    @property
    def good(self) -> float:
        return self.prediction.good or 0.0

    @property
    def question(self) -> str:
        return shorten(self.prediction.question, 800)

    @property
    def target(self) -> str:
        return shorten(readable(self.prediction.target), 400)

    @property
    def answers(self) -> dict[str, str]:
        """Condition -> answer."""
        answers = self.prediction.answers
        return {name: shorten(readable(answers[name]), 400) for name in ANSWERS if name in answers}

    @property
    def boxes(self) -> list[DrawnBox]:
        """Of the target and the tuned answer, if they are boxes."""
        sides: dict[Literal["target", "tuned"], Any] = {
            "target": self.prediction.target,
            "tuned": self.prediction.tuned,
        }
        return [
            DrawnBox(kind, left / 10, top / 10, (right - left) / 10, (bottom - top) / 10)
            for kind, regions in sides.items()
            if isinstance(regions, list)
            for left, top, right, bottom in (region["box"] for region in regions if is_region(region))
        ]

    @property
    def more_media(self) -> int:
        """Number of media that aren't embedded."""
        return max(0, len(self.prediction.media) - MEDIA)

    @property
    def verdict(self) -> Literal["right", "wrong", ""]:
        """ "right" if the tuned answer is the target to the letter, "wrong" if it is text that is worth nothing."""
        target = self.prediction.target
        if readable(label_of(self.prediction.tuned)) == readable(target):
            return "right"
        return "wrong" if self.good <= 0 and isinstance(target, str | list) else ""

    @property
    def long(self) -> bool:
        """Whether its text needs the whole width."""
        return any(len(text) > 20 for text in (self.target, *self.answers.values()))


@dataclass
class Album:
    """Embeds media until `room` bytes are used up. `left_out`: number of media without room; `broken`: number of media
    that can't be read any more.
    """

    limits: Limits
    room: int = MEDIA_BYTES
    left_out: int = 0
    broken: int = 0
    _embedded: dict[Medium, AlbumMedium] = field(default_factory=dict)

    def embed(self, medium: Medium) -> AlbumMedium:
        """A thumbnail of a picture or of a video's first frame; a recording's first seconds."""
        if medium not in self._embedded:
            self._embedded[medium] = self._embed(medium)
        embedded = self._embedded[medium]
        self.broken += bool(embedded.note)
        if len(embedded.uri) > self.room:
            self.left_out += 1
            return AlbumMedium(embedded.kind, embedded.name, note="left out to keep the page small")
        self.room -= len(embedded.uri)
        return embedded

    def _embed(self, medium: Medium) -> AlbumMedium:
        kind, path, name = medium.kind, medium.path, shorten(medium.path.name, 120)
        if kind not in DECODERS:
            return AlbumMedium(kind, name, note=f"a medium of kind {shorten(kind, 40)!r} can't be shown")
        if not path.is_file():
            return AlbumMedium(kind, name, note="the file is missing")
        first_frame = {"per_second": 1 / (2 * self.limits.max_seconds)} if kind == "video" else {}
        try:
            decoded = decode(kind, path, where=name, limits=self.limits, **first_frame)
        except MediaError as error:
            return AlbumMedium(kind, name, note=str(error))
        if kind == "audio":
            return AlbumMedium(kind, name, sound_uri(decoded, SECONDS))
        picture = decoded if kind == "image" else decoded.frames[0]
        return AlbumMedium(kind, name, picture_uri(picture, THUMBNAIL, "webp", quality=75))


def is_region(value: object) -> bool:
    """Whether it is a box as the task `ground` reads one: thousandths of the picture's width and height."""
    box = value.get("box") if isinstance(value, dict) else None
    return isinstance(box, list) and len(box) == 4 and all(isinstance(number, int | float) for number in box)


def examples(predictions: Sequence[Prediction], album: Album) -> list[Example]:
    """Of each task the wrong or worst predictions, then the right or best. Equally good ones are ordered by the model's
    confidence, then by a hash of the row, so that they come from all over the file. Predictions that aren't scored are
    left out.
    """
    tasks: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        if prediction.good is not None:
            tasks.setdefault(prediction.task, []).append(prediction)
    most = min(PER_SIDE, MAX_EXAMPLES // (2 * max(len(tasks), 1)) or 1)
    chosen = [example for rows in tasks.values() for example in _worst_and_best(rows, most)]
    for example in sorted(chosen, key=lambda example: example.rank):  # room is for all tasks and both sides
        example.media = [album.embed(medium) for medium in example.prediction.media[:MEDIA]]
    return chosen


def _worst_and_best(rows: Sequence[Prediction], most: int) -> list[Example]:
    def tie(row: Prediction) -> tuple[float, str]:
        return -(confidence(row.tuned) or 0.0), hashlib.sha256(row.row.encode()).hexdigest()

    ordered = sorted(rows, key=lambda row: (row.good or 0.0, *tie(row)))
    right = sum(row.good == 1 for row in rows)
    simple = all(row.good in (0, 1) for row in rows)
    half = len(rows) - right if simple else -(-len(rows) // 2)
    names = {"worst": "wrong answers", "best": "right answers"} if simple else {}
    sides: dict[Side, list[Prediction]] = {
        "worst": ordered[:half],
        "best": sorted(ordered[half:], key=lambda row: (-(row.good or 0.0), *tie(row))),
    }
    return [
        Example(row, side, f"{names[side]}, {len(own):,} of {len(rows):,}" if simple else f"{side} answers", rank)
        for side, own in sides.items()
        for rank, row in enumerate(own[:most])
    ]
