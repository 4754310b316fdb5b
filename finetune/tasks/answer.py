"""Answer each row's own question about its media."""

from pydantic import Field

from finetune.data.sample import Message, Row, Sample
from finetune.parts import PartOptions
from finetune.scoring import free_text

PRIMARY = "exact_match"


class Options(PartOptions):
    media: tuple[str, ...] = Field(("image",), description="Kinds of media, each in the column of its name.")
    question: str = Field("question", description="Column of the question, put after the media; '' for none.")
    answer: str = Field("answer", description="Column that holds the answer.")
    transcript: str = Field("", description="Column that says in words what the media show or say, for distill.")


def media(options: Options) -> tuple[str, ...]:
    return options.media


def sample(row: Row, options: Options) -> Sample:
    content = row.media(options.media, row.text(options.transcript) if options.transcript else None)
    question = (row.text(options.question),) if options.question else ()
    return Sample(
        (Message("user", (*content, *question)), Message("assistant", (row.text(options.answer),))), row.where, "answer"
    )


def read(answer: str, options: Options) -> str:
    return answer.strip()


def score(predictions: list[str], targets: list[str], options: Options) -> dict[str, float]:
    return free_text(predictions, targets)
