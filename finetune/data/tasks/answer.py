"""Answer each row's own question about its media."""

from typing import Any

from pydantic import Field

from finetune.common.registry import PartOptions
from finetune.data.metrics import means
from finetune.data.metrics.text import FREE_TEXT, free_text
from finetune.data.sample import Answer, Message, Row, Sample
from finetune.data.tasks._columns import ask, text_of, transcript_of

HEADS = ("language",)
PRIMARY = "exact_match"


class Options(PartOptions):
    prompt: str = Field("", description="Put after the row's question; '' for nothing.")
    media: tuple[str, ...] = Field(
        ("image",), description="Kinds of media, each in the column of its name; [] for none."
    )
    text: str = Field("", description="Column of text put before the question; '' for none.")
    question: str = Field("question", description="Column of the question, put after the media; '' for none.")
    answer: str = Field("answer", description="Column that holds the answer.")
    transcript: str = Field("", description="Column that says in words what the media show or say, for distill.")


def media(options: Options) -> tuple[str, ...]:
    return options.media


def sample(row: Row, options: Options) -> Sample:
    transcript = transcript_of(row, options.transcript)
    question = ask(row, options.prompt, options.media, (options.text, options.question), transcript)
    return Sample((question, Message("assistant", (text_of(row, options.answer),))), row.where, "answer")


def read(answer: Answer, options: Options) -> str:
    return answer.text.strip()


def measure(prediction: str, target: str, options: Options) -> dict[str, Any]:
    return free_text(prediction, [target])


def score(rows: list[dict[str, Any]], options: Options) -> dict[str, float]:
    """Means over rows: the answer letter for letter, F1 of its words, F1 of its longest common subsequence."""
    return means(rows, FREE_TEXT)
