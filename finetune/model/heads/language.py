"""The LLM's own head: it writes its answer, or says how likely it would write each of the labels."""

from typing import Literal

from pydantic import Field

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.model.heads import HeadSettings

TRAINED = False
MOST = 1000  # different answers: more aren't labels


class Options(PartOptions):
    answers: Literal["written", "labels"] = Field(
        "written",
        description="written: tokens as they come; labels: the likeliest of the training rows' answers, each read to "
        "its end, so that there are probabilities and nothing else can be answered.",
    )


def settings(targets: list[str], options: Options) -> HeadSettings:
    if options.answers == "written":
        return HeadSettings()
    labels = sorted({*targets})
    if len(labels) > MOST:
        raise DataError(f"head: {len(labels):,} different answers in the training rows; up to {MOST:,} can be labels")
    return HeadSettings(labels=tuple(labels))
