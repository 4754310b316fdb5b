"""How relevant an item is to a user, a session or a query; the items of a group are put in order by it.

A row is one item of a group. A score head rates it; a language head says whether it is relevant, and its probability of
that, or else what it says, makes the order.
"""

import math
from typing import Any, Self

from pydantic import Field, model_validator

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.data.metrics.labels import fold
from finetune.data.metrics.ranking import group_counts, ranking_scores
from finetune.data.sample import Answer, Message, Row, Sample
from finetune.data.tasks._columns import ask, number_of, text_of, transcript_of

HEADS = ("score", "language")
PRIMARY = "mrr"


class Options(PartOptions):
    prompt: str = Field("Is this relevant?", description="The question put after the media and texts.")
    media: tuple[str, ...] = Field((), description="Kinds of media, each in the column of its name; [] for none.")
    text: tuple[str, ...] = Field(
        ("history", "item"), description="Columns of text put before the question, each on a line; [] for none."
    )
    group: str = Field("group", description="Column of the user, session or query whose items are ranked together.")
    relevance: str = Field("relevance", description="Column of the relevance: a number, 0 for none; clicked is 1.")
    relevant: str = Field("yes", min_length=1, description="What is answered where the relevance is above 0.")
    irrelevant: str = Field("no", min_length=1, description="What is answered where it is 0.")
    k: int = Field(10, ge=1, description="Items of a group that ndcg@k and hit_rate@k look at, from the top.")
    transcript: str = Field("", description="Column that says in words what the media show or say, for distill.")

    @model_validator(mode="after")
    def _answers_can_be_told_apart(self) -> Self:
        if fold(self.relevant) == fold(self.irrelevant):
            raise ValueError(f"relevant: {self.relevant!r} is what irrelevant is; write another.")
        return self


def media(options: Options) -> tuple[str, ...]:
    return options.media


def sample(row: Row, options: Options) -> Sample:
    group, relevance = text_of(row, options.group), _relevance(row, options)
    question = ask(row, options.prompt, options.media, options.text, transcript_of(row, options.transcript))
    answer = Message("assistant", (options.relevant if relevance > 0 else options.irrelevant,))
    target = {"group": group, "relevance": relevance}
    return Sample((question, answer), row.where, "rank", target=target, group=group)


def read(answer: Answer, options: Options) -> float | None:
    """What items are ordered by: a head's number; the probability of `relevant` among the two; 1 or 0 where they are
    written. None where neither is.
    """
    if answer.number is not None:
        return answer.number if math.isfinite(answer.number) else None
    yes, no = fold(options.relevant), fold(options.irrelevant)
    if answer.probabilities is not None:
        chances = {fold(label): chance for label, chance in answer.probabilities.items()}
        both = chances.get(yes, 0.0) + chances.get(no, 0.0)
        return chances.get(yes, 0.0) / both if both else None
    return {yes: 1.0, no: 0.0}.get(fold(answer.text))


def measure(prediction: float | None, target: dict[str, Any], options: Options) -> dict[str, Any]:
    """ "good": the number where the item is relevant, else 1 less the number: a probability's share of the truth."""
    relevance = target["relevance"]
    good = 0.0 if prediction is None else prediction if relevance > 0 else 1 - prediction
    return {"good": good, "group": target["group"], "said": prediction, "right": relevance}


def score(rows: list[dict[str, Any]], options: Options) -> dict[str, float]:
    """Means over groups that hold a relevant item; ties count as the mean over the orders they leave open."""
    return ranking_scores(rows, options.k)


def tables(rows: list[dict[str, Any]], options: Options) -> dict[str, Any]:
    """ "groups": how many there are, with a relevant item ("ranked"), with others too ("with_both")."""
    return {"groups": group_counts(rows)}


def _relevance(row: Row, options: Options) -> float:
    value = row.columns.get(options.relevance)
    relevance = float(value) if isinstance(value, bool) else number_of(row, options.relevance)
    if relevance < 0:
        raise DataError(
            f"{row.where}: column {options.relevance!r} holds {relevance:g}; write 0 for no relevance, or more"
        )
    return relevance
