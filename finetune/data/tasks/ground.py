"""Locate something in a picture by boxes '[x1, y1, x2, y2]' in thousandths of its width and height, so that they hold
at any size. Several are written one per line, each after its label if it has one.
"""

import re
from collections.abc import Sequence
from typing import Literal, TypedDict

from pydantic import Field

from finetune.common.errors import DataError, MissingColumn
from finetune.data.formats import Columns
from finetune.data.media.image import image_size
from finetune.data.metrics.boxes import box_scores, matched
from finetune.data.metrics.labels import fold
from finetune.data.sample import Answer, Message, Row, Sample, media_in
from finetune.data.tasks import Measure, Prompt
from finetune.data.tasks._columns import (
    NUMBER,
    DistillableOptions,
    TextColumns,
    numbers_in,
    question,
    texts_of,
    value_of,
)

HEADS = ("language",)
PRIMARY = "iou"

FULL = 1000  # width and height of any picture
TOLERANCE = 5  # thousandths by which a box may leave the picture: some annotators count the last pixel
CELL = rf"\s*({NUMBER})\s*"
BOX = re.compile(rf"([^\[\]\n]*)\[{CELL}[,，]{CELL}[,，]{CELL}[,，]{CELL}\]")


class Options(DistillableOptions):
    prompt: Prompt = "Where is it? [x1, y1, x2, y2], 0 to 1000"
    text: TextColumns = Field(
        "phrase",
        description="Column of the phrase to locate, put before the question, or a list of columns, each on its own "
        "line; '' for none.",
    )
    boxes: str = Field("boxes", description="Column of a box, four numbers, or of a list of boxes; [] for none.")
    labels: str = Field("", description="Column of the labels of the boxes, one for each; '' for none.")
    separator: str = Field(";", description="Separator of labels that aren't a list.")
    units: Literal["pixels", "fractions", "thousandths"] = Field(
        "pixels",
        description="Unit of the column: pixels of the upright picture, 0..1 or 0..1000 of its width and height.",
    )
    order: Literal["corners", "corner_and_size"] = Field(
        "corners", description="Numbers of a box: left, top, right, bottom; or left, top, width, height (COCO)."
    )


class Region(TypedDict):
    label: str
    box: list[int]  # left, top, right, bottom in thousandths


def sample(row: Row, options: Options) -> Sample:
    user_turn = question(row, options)
    boxes = [_scaled(box, row, user_turn, options) for box in _boxes_of(row, options)]
    labels = texts_of(row, options.labels, options.separator) if options.labels and boxes else [""] * len(boxes)
    if len(labels) != len(boxes):
        raise DataError(
            f"{row.where}: {len(boxes)} boxes in column {options.boxes!r}, {len(labels)} labels in {options.labels!r}"
        )
    target = [{"label": label, "box": box} for label, box in zip(labels, boxes, strict=True)]
    lines = [f"{label} {box}".strip() for label, box in zip(labels, boxes, strict=True)]
    answer = Message("assistant", ("\n".join(lines) or "[]",))
    return Sample((user_turn, answer), row.where, "ground", target=target)


def stand_in(row: Row, options: Options) -> Columns:
    return {options.boxes: []}


def read(answer: Answer, options: Options) -> list[Region] | None:
    """The boxes in the text, clipped to the picture; [] if that is the text; None if there are no boxes."""
    regions: list[Region] = [
        {"label": label.strip(" \t,，;；:：-"), "box": [min(max(round(float(number)), 0), FULL) for number in numbers]}
        for label, *numbers in BOX.findall(answer.text)
    ]
    return regions if regions or answer.text.strip() == "[]" else None


def measure(prediction: list[Region] | None, target: list[Region], options: Options) -> Measure:
    """If there are labels, boxes are only compared with boxes of the same label."""
    if prediction is None:  # an unreadable answer scores 0 even if there is nothing to locate
        return matched([], [region["box"] for region in target], []) | {"good": 0.0, "iou": 0.0, "accuracy@0.5": 0.0}
    labels, right_labels = ([fold(region["label"]) for region in regions] for regions in (prediction, target))
    comparable = [[not options.labels or label == right for right in right_labels] for label in labels]
    return matched([region["box"] for region in prediction], [region["box"] for region in target], comparable)


def score(rows: Sequence[Measure], options: Options) -> dict[str, float]:
    """iou: mean overlap with the right boxes; accuracy@0.5: share of rows whose boxes all overlap with the
    right ones by at least half, without any others; f1@0.5: over the boxes of all rows.
    """
    return box_scores(rows)


def _boxes_of(row: Row, options: Options) -> list[list[float]]:
    """The boxes of the column in its own unit: four numbers each. Raises DataError."""
    value = value_of(row, options.boxes)
    if isinstance(value, str):
        numbers = numbers_in(value)
        value = [numbers[i : i + 4] for i in range(0, len(numbers), 4)] or value
    elif isinstance(value, list) and value and not isinstance(value[0], list):
        value = [value]
    if isinstance(value, list) and all(
        isinstance(box, list) and len(box) == 4 and all(type(number) in (int, float) for number in box) for box in value
    ):
        return value
    what = f"{row.where}: {row.called(options.boxes)}"
    if options.boxes not in row.columns:
        raise MissingColumn(f"{what} is missing; write [x1, y1, x2, y2], or a list of boxes", options.boxes)
    raise DataError(f"{what} holds {str(value)[:60]!r}; write [x1, y1, x2, y2], or a list of boxes")


def _scaled(box: list[float], row: Row, question: Message, options: Options) -> list[int]:
    """Corners in thousandths of the picture. Raises DataError."""
    width, height = {"fractions": (1, 1), "thousandths": (FULL, FULL)}.get(options.units) or _size(row, question)
    left, top, right, bottom = box
    if options.order == "corner_and_size":
        right, bottom = left + right, top + bottom
    corners = [left * FULL / width, top * FULL / height, right * FULL / width, bottom * FULL / height]
    what = f"{row.where}: box {box} in column {options.boxes!r}"
    if not all(-TOLERANCE <= corner <= FULL + TOLERANCE for corner in corners):
        raise DataError(f"{what} leaves the picture, {width} x {height}; see the task's `units` and `order`")
    if not (left < right and top < bottom):
        raise DataError(f"{what} has no area; see the task's `order`: are the numbers corners, or a corner and a size?")
    x1, y1, x2, y2 = (min(max(round(corner), 0), FULL) for corner in corners)
    x1, y1 = min(x1, FULL - 1), min(y1, FULL - 1)  # no box is narrower than a thousandth
    return [x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)]


def _size(row: Row, question: Message) -> tuple[int, int]:
    pictures = [medium for medium in media_in([question]) if medium.kind == "image"]
    if len(pictures) != 1:
        raise DataError(
            f"{row.where}: {len(pictures)} pictures; boxes in pixels need exactly one, or set other `units`"
        )
    return image_size(pictures[0].path, where=row.where)
