"""Rank the items of a group (a user, a session or a query) by relevance.

Each row is one item of a group. A score head rates it. A language head answers whether it is relevant, and items are
ordered by the probability of that answer, or else by the answer itself.
"""

import math
from collections.abc import Sequence
from typing import Self, TypedDict

from pydantic import Field, model_validator

from finetune.common.errors import DataError
from finetune.data.formats import Columns
from finetune.data.metrics.labels import fold
from finetune.data.metrics.ranking import group_counts, ranking_scores
from finetune.data.sample import Answer, Message, Row, Sample
from finetune.data.tasks import Measure, Media, Prompt, Tables, TaskOptions, Transcript
from finetune.data.tasks._columns import TextColumns, listed, number_of, user_turn

HEADS = ("score", "language")
PRIMARY = "mrr"


class Options(TaskOptions):
    prompt: Prompt = "Is this relevant?"
    media: Media = ()
    text: TextColumns = Field(
        ("history", "item"),
        description="Column of text put before the question, or a list of them, each on its own line; [] for none.",
    )
    group: str = Field("group", description="Column of the user, session or query whose items are ranked together.")
    relevance: str = Field("relevance", description="Column of the relevance, a number: 0 for none; 1 for a click.")
    relevant: str = Field("yes", min_length=1, description="The answer for relevance above 0.")
    irrelevant: str = Field("no", min_length=1, description="The answer for relevance 0.")
    k: int = Field(10, ge=1, description="Number of top items that ndcg@k and hit_rate@k count.")
    transcript: Transcript = ""

    @model_validator(mode="after")
    def _answers_differ(self) -> Self:
        if fold(self.relevant) == fold(self.irrelevant):
            raise ValueError(f"relevant: {self.relevant!r} is the same answer as irrelevant; write another.")
        return self


class Target(TypedDict):
    group: str
    relevance: float


def sample(row: Row, options: Options) -> Sample:
    group, relevance = row.text(options.group), _relevance(row, options)
    transcript = row.text(options.transcript) if options.transcript else None
    question = user_turn(row, options.media, listed(options.text), options.prompt, transcript)
    answer = Message("assistant", (options.relevant if relevance > 0 else options.irrelevant,))
    target: Target = {"group": group, "relevance": relevance}
    return Sample((question, answer), row.where, "rank", target=target, group=group)


def stand_in(row: Row, options: Options) -> Columns:
    return {options.relevance: 0} | ({} if _has_group(row, options) else {options.group: "?"})


def group_of(row: Row, options: Options) -> str:
    """Rows without one, whose answers aren't known, are ranked together."""
    return row.text(options.group) if _has_group(row, options) else "?"


def _has_group(row: Row, options: Options) -> bool:
    return row.columns.get(options.group) not in (None, "")


def read(answer: Answer, options: Options) -> float | None:
    """The value by which items are ordered: the head's number; the probability of `relevant` among the two answers; or
    1 or 0 for the written answer. None if it is neither.
    """
    if answer.number is not None:
        return answer.number if math.isfinite(answer.number) else None
    yes, no = fold(options.relevant), fold(options.irrelevant)
    if answer.probabilities is not None:
        probabilities = {fold(label): probability for label, probability in answer.probabilities.items()}
        both = probabilities.get(yes, 0.0) + probabilities.get(no, 0.0)
        return probabilities.get(yes, 0.0) / both if both else None
    return {yes: 1.0, no: 0.0}.get(fold(answer.text))


def measure(prediction: float | None, target: Target, options: Options) -> Measure:
    """ "good": the prediction for a relevant item, 1 - prediction for another: the probability of the truth."""
    relevance = target["relevance"]
    good = 0.0 if prediction is None else prediction if relevance > 0 else 1 - prediction
    return {"good": good, "group": target["group"], "predicted": prediction, "right": relevance}


def score(rows: Sequence[Measure], options: Options) -> dict[str, float]:
    """Means over groups with a relevant item; ties count as the mean over all orders of the tied items."""
    return ranking_scores(rows, options.k)


def tables(rows: Sequence[Measure], options: Options) -> Tables:
    """ "groups": their number, those with a relevant item ("ranked"), and those of them with others ("with_both")."""
    return {"groups": group_counts(rows)}


def _relevance(row: Row, options: Options) -> float:
    value = row.columns.get(options.relevance)
    relevance = float(value) if isinstance(value, bool) else number_of(row, options.relevance)
    if relevance < 0:
        raise DataError(f"{row.where}: {row.called(options.relevance)} holds {relevance:g}; write 0 or more")
    return relevance
