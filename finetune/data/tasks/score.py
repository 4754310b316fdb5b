"""A number: a rating, an age, a price, how likely a click is."""

import math
from typing import Any, Self

from pydantic import Field, model_validator

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.data.metrics.numbers import number_in, number_scores
from finetune.data.sample import Answer, Message, Row, Sample
from finetune.data.tasks._columns import ask, number_of, transcript_of

HEADS = ("score", "language")
PRIMARY = "mean_absolute_error"


class Options(PartOptions):
    prompt: str = Field("How would you rate it?", description="The question put after the media.")
    media: tuple[str, ...] = Field(
        ("image",), description="Kinds of media, each in the column of its name; [] for none."
    )
    text: str = Field("", description="Column of text put before the question; '' for none.")
    number: str = Field("score", description="Column that holds the number.")
    minimum: float | None = Field(None, description="The least there is, in the column's unit; null: no bound.")
    maximum: float | None = Field(None, description="The most there is, in the column's unit; null: no bound.")
    digits: int = Field(2, ge=0, le=6, description="Digits after the point of a number that is written, at most.")
    transcript: str = Field("", description="Column that says in words what the media show or say, for distill.")

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.minimum is not None and self.maximum is not None and self.minimum >= self.maximum:
            raise ValueError(f"minimum: {self.minimum:g} is not below the maximum, {self.maximum:g}.")
        return self


def media(options: Options) -> tuple[str, ...]:
    return options.media


def sample(row: Row, options: Options) -> Sample:
    number = number_of(row, options.number)
    if _bounded(number, options) != number:
        bounds = f"{options.minimum} to {options.maximum}"
        raise DataError(f"{row.where}: column {options.number!r} holds {number:g}; the task's bounds are {bounds}")
    question = ask(row, options.prompt, options.media, (options.text,), transcript_of(row, options.transcript))
    return Sample(
        (question, Message("assistant", (written(number, options.digits),))), row.where, "score", target=number
    )


def read(answer: Answer, options: Options) -> float | None:
    """A head's number, or the one that the text holds, no further than the bounds. None where there isn't just one."""
    number = number_in(answer.text) if answer.number is None else answer.number
    return _bounded(number, options) if number is not None and math.isfinite(number) else None


def measure(prediction: float | None, target: float, options: Options) -> dict[str, Any]:
    """ "good": 1 less the error as a share of the range, or, without one, 1 / (1 + error)."""
    if prediction is None:
        return {"good": 0.0, "said": None, "right": target}
    error = abs(prediction - target)
    if options.minimum is None or options.maximum is None:
        return {"good": 1 / (1 + error), "said": prediction, "right": target}
    return {"good": 1 - error / (options.maximum - options.minimum), "said": prediction, "right": target}


def score(rows: list[dict[str, Any]], options: Options) -> dict[str, float]:
    """Errors in the column's unit, an answer that holds no number counting as the largest there can be; correlations;
    readable: the share of answers that hold a number.
    """
    return number_scores(rows, options.minimum, options.maximum)


def written(number: float, digits: int) -> str:
    """'4', '4.5': no more digits after the point than `digits`, and no zeros at the end."""
    text = f"{number:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _bounded(number: float, options: Options) -> float:
    low = -math.inf if options.minimum is None else options.minimum
    return min(max(number, low), math.inf if options.maximum is None else options.maximum)
