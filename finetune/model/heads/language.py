"""The LLM's own head: it writes its answer, or gives the probability of writing each of the labels."""

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.model.heads import HeadSettings

TRAINED = False
MAX_LABELS = 1000  # more different answers are free text


class Options(PartOptions):
    answers: Literal["written", "labels"] = Field(
        "written",
        description="written: generate tokens freely; labels: compute the probability of each answer of the training "
        "rows, to its last token, and answer with the most probable one.",
    )


def settings(targets: Iterable[str], options: Options) -> HeadSettings:
    if options.answers == "written":
        return HeadSettings()
    labels = tuple(sorted({*targets}))
    if len(labels) > MAX_LABELS:
        raise DataError(
            f"head: the training rows hold {len(labels):,} different answers; `answers: labels` takes at most "
            f"{MAX_LABELS:,}"
        )
    return HeadSettings(labels=labels)
