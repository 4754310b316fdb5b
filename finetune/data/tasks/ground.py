"""Where something is in a picture: boxes, written as '[x1, y1, x2, y2]' in thousandths of its width and height, so that
they stay right at any size. Several stand on lines of their own, after their labels where they have any.
"""

import re
from typing import Any, Literal

from pydantic import Field

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.data.media.image import image_size
from finetune.data.metrics.boxes import box_scores, matched
from finetune.data.metrics.labels import fold
from finetune.data.sample import Answer, Message, Row, Sample
from finetune.data.tasks._columns import ask, texts_of, transcript_of, value_of

HEADS = ("language",)
PRIMARY = "iou"

FULL = 1000  # what the width and the height are counted as
BEYOND = 5  # thousandths by which a box may leave the picture: annotators' last pixel
NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
BOX = re.compile(rf"([^\[\]\n]*)\[{NUMBER}[,，]{NUMBER}[,，]{NUMBER}[,，]{NUMBER}\]")


class Options(PartOptions):
    prompt: str = Field("Where is it? [x1, y1, x2, y2], 0 to 1000", description="The question put after the media.")
    media: tuple[str, ...] = Field(("image",), description="Kinds of media, each in the column of its name.")
    text: str = Field("phrase", description="Column of what is sought, put before the question; '' for none.")
    boxes: str = Field(
        "boxes", description="Column of the box or boxes: four numbers each, or a list of such; [] none."
    )
    labels: str = Field("", description="Column of the boxes' labels, as many as boxes; '' for none.")
    separator: str = Field(";", description="What stands between labels that aren't a list.")
    units: Literal["pixels", "fractions", "thousandths"] = Field(
        "pixels", description="Of the column: pixels of the upright picture, 0..1 or 0..1000 of its width and height."
    )
    order: Literal["corners", "corner_and_size"] = Field(
        "corners", description="Of the column's numbers: left, top, right, bottom; or left, top, width, height (COCO)."
    )
    transcript: str = Field("", description="Column that says in words what the media show or say, for distill.")


def media(options: Options) -> tuple[str, ...]:
    return options.media


def sample(row: Row, options: Options) -> Sample:
    question = ask(row, options.prompt, options.media, (options.text,), transcript_of(row, options.transcript))
    boxes = [_scaled(box, row, question, options) for box in _boxes_of(row, options)]
    labels = texts_of(row, options.labels, options.separator) if options.labels and boxes else [""] * len(boxes)
    if len(labels) != len(boxes):
        raise DataError(
            f"{row.where}: {len(boxes)} boxes in column {options.boxes!r}, {len(labels)} labels in {options.labels!r}"
        )
    target = [{"label": label, "box": box} for label, box in zip(labels, boxes, strict=True)]
    lines = [f"{label} {box}".strip() for label, box in zip(labels, boxes, strict=True)]
    answer = Message("assistant", ("\n".join(lines) or "[]",))
    return Sample((question, answer), row.where, "ground", target=target)


def read(answer: Answer, options: Options) -> list[dict[str, Any]] | None:
    """[{"label": "", "box": [x1, y1, x2, y2]}, ...] of the boxes that the text holds, within the picture; [] where it
    says so; None where there are none.
    """
    found = [
        {"label": label.strip(" \t,，;；:：-"), "box": [min(max(round(float(number)), 0), FULL) for number in numbers]}
        for label, *numbers in BOX.findall(answer.text)
    ]
    return found if found or answer.text.strip() == "[]" else None


def measure(prediction: list[dict[str, Any]] | None, target: list[dict[str, Any]], options: Options) -> dict[str, Any]:
    """Boxes with labels are only compared with boxes of the same label."""
    if prediction is None:  # nothing that can be read is not the same as nothing there
        return matched([], [found["box"] for found in target], []) | {"good": 0.0, "iou": 0.0, "accuracy@0.5": 0.0}
    said, right = ([fold(found["label"]) for found in side] for side in (prediction, target))
    alike = [[not options.labels or one == other for other in right] for one in said]
    return matched([found["box"] for found in prediction], [found["box"] for found in target], alike)


def score(rows: list[dict[str, Any]], options: Options) -> dict[str, float]:
    """iou: mean overlap with the right boxes; accuracy@0.5: rows whose boxes are all found, by at least half, with none
    besides; f1@0.5: of the boxes of all rows.
    """
    return box_scores(rows)


def _boxes_of(row: Row, options: Options) -> list[list[float]]:
    """The column's boxes as they are: four numbers each. Raises DataError."""
    value = value_of(row, options.boxes)
    if isinstance(value, str):
        numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", value)]
        value = [numbers[i : i + 4] for i in range(0, len(numbers), 4)] or value
    elif isinstance(value, list) and value and not isinstance(value[0], list):
        value = [value]
    if isinstance(value, list) and all(
        isinstance(box, list) and len(box) == 4 and all(type(number) in (int, float) for number in box) for box in value
    ):
        return value
    seen = f"holds {str(value)[:60]!r}" if options.boxes in row.columns else "is missing"
    raise DataError(f"{row.where}: column {options.boxes!r} {seen}; write [x1, y1, x2, y2], or a list of such")


def _scaled(box: list[float], row: Row, question: Message, options: Options) -> list[int]:
    """Corners in thousandths of the picture. Raises DataError."""
    width, height = {"fractions": (1, 1), "thousandths": (FULL, FULL)}.get(options.units) or _size(row, question)
    left, top, right, bottom = box
    if options.order == "corner_and_size":
        right, bottom = left + right, top + bottom
    corners = [left * FULL / width, top * FULL / height, right * FULL / width, bottom * FULL / height]
    what = f"{row.where}: box {box} in column {options.boxes!r}"
    if not all(-BEYOND <= corner <= FULL + BEYOND for corner in corners):
        raise DataError(f"{what} leaves the picture, {width} x {height}; see the task's `units` and `order`")
    if not (left < right and top < bottom):
        raise DataError(f"{what} has no area; see the task's `order`: are they corners, or a corner and a size?")
    x1, y1, x2, y2 = (min(max(round(corner), 0), FULL) for corner in corners)
    x1, y1 = min(x1, FULL - 1), min(y1, FULL - 1)  # the smallest thing still has a thousandth
    return [x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)]


def _size(row: Row, question: Message) -> tuple[int, int]:
    pictures = [part for part in question.content if not isinstance(part, str) and part.kind == "image"]
    if len(pictures) != 1:
        raise DataError(f"{row.where}: {len(pictures)} pictures; boxes in pixels need one, or other `units`")
    return image_size(pictures[0].path, where=row.where)
