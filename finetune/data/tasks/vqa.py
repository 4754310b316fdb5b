"""Answer questions on pictures that several people answered (VQA)."""

from typing import Any

from pydantic import Field

from finetune.common.registry import PartOptions
from finetune.data.metrics import means
from finetune.data.metrics.answers import commonest, normalised, vqa_accuracy
from finetune.data.sample import Answer, Message, Row, Sample
from finetune.data.tasks._columns import ask, text_of, texts_of, transcript_of

HEADS = ("language",)
PRIMARY = "vqa_accuracy"


class Options(PartOptions):
    prompt: str = Field("", description="Put after the row's question, like 'Answer in one word.'; '' for nothing.")
    media: tuple[str, ...] = Field(
        ("image",), description="Kinds of media, each in the column of its name; [] for none."
    )
    text: str = Field("", description="Column of text put before the question; '' for none.")
    question: str = Field("question", description="Column of the question, put after the media.")
    answers: str = Field("answers", description="Column of the answers: a list; the commonest is learnt.")
    separator: str = Field(";", description="What stands between answers that aren't a list; '' where there is one.")
    transcript: str = Field("", description="Column that says in words what the media show or say, for distill.")


def media(options: Options) -> tuple[str, ...]:
    return options.media


def sample(row: Row, options: Options) -> Sample:
    answers = texts_of(row, options.answers, options.separator)
    text_of(row, options.question)
    transcript = transcript_of(row, options.transcript)
    question = ask(row, options.prompt, options.media, (options.text, options.question), transcript)
    return Sample((question, Message("assistant", (commonest(answers),))), row.where, "vqa", target=answers)


def read(answer: Answer, options: Options) -> str:
    return answer.text.strip()


def measure(prediction: str, target: list[str], options: Options) -> dict[str, Any]:
    said, right = normalised(prediction), [normalised(answer) for answer in target]
    accuracy = vqa_accuracy(said, right)
    return {"good": accuracy, "exact_match": float(said == normalised(commonest(target))), "vqa_accuracy": accuracy}


def score(rows: list[dict[str, Any]], options: Options) -> dict[str, float]:
    """exact_match: the share of rows with the commonest answer. vqa_accuracy: how many of the people agree, three being
    enough. Articles, punctuation, case, and digits or words for numbers don't count.
    """
    return means(rows, ("exact_match", "vqa_accuracy"))
