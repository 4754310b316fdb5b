"""Predict a number: a rating, an age, a price, the probability of a click."""

import math
from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from finetune.common.errors import DataError
from finetune.data.formats import Columns
from finetune.data.metrics.numbers import number_in, number_scores
from finetune.data.sample import Answer, Message, Row, Sample
from finetune.data.tasks import Measure, Prompt
from finetune.data.tasks._columns import DistillableOptions, number_of, question

HEADS = ("score", "language")
PRIMARY = "mean_absolute_error"


class Options(DistillableOptions):
    prompt: Prompt = "How would you rate it?"
    number: str = Field("score", description="Column of the number.")
    minimum: float | None = Field(None, description="Lower bound, in the column's unit; null: none.")
    maximum: float | None = Field(None, description="Upper bound, in the column's unit; null: none.")
    digits: int = Field(2, ge=0, le=6, description="Maximum number of digits after the point in a written answer.")

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.minimum is not None and self.maximum is not None and self.minimum >= self.maximum:
            raise ValueError(f"minimum: {self.minimum:g} is not below the maximum, {self.maximum:g}.")
        return self


def sample(row: Row, options: Options) -> Sample:
    number = number_of(row, options.number)
    if _bounded(number, options) != number:
        bounds = f"{options.minimum} to {options.maximum}"
        raise DataError(f"{row.where}: {row.called(options.number)} holds {number:g}; the task's bounds are {bounds}")
    turns = question(row, options), Message("assistant", (written(number, options.digits),))
    return Sample(turns, row.where, "score", target=number)


def stand_in(row: Row, options: Options) -> Columns:
    return {options.number: _bounded(0, options)}


def read(answer: Answer, options: Options) -> float | None:
    """The head's number, or the only one in the text, clipped to the bounds; None if there is no such number."""
    number = number_in(answer.text) if answer.number is None else answer.number
    return _bounded(number, options) if number is not None and math.isfinite(number) else None


def measure(prediction: float | None, target: float, options: Options) -> Measure:
    """ "good": 1 - error / range; without bounds, 1 / (1 + error)."""
    if prediction is None:
        return {"good": 0.0, "predicted": None, "right": target}
    error = abs(prediction - target)
    if options.minimum is None or options.maximum is None:
        return {"good": 1 / (1 + error), "predicted": prediction, "right": target}
    return {"good": 1 - error / (options.maximum - options.minimum), "predicted": prediction, "right": target}


def score(rows: Sequence[Measure], options: Options) -> dict[str, float]:
    """Errors in the column's unit, where an answer without a number counts as the largest possible error; correlations;
    readable: the share of answers with a number.
    """
    return number_scores(rows, options.minimum, options.maximum)


def written(number: float, digits: int) -> str:
    """'4', '4.5': at most `digits` digits after the point, without trailing zeros."""
    text = f"{number:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _bounded(number: float, options: Options) -> float:
    low = -math.inf if options.minimum is None else options.minimum
    return min(max(number, low), math.inf if options.maximum is None else options.maximum)
