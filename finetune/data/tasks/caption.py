"""Say in words what a picture, a recording or a video shows."""

from typing import Any

from pydantic import Field

from finetune.common.registry import PartOptions
from finetune.data.metrics import means
from finetune.data.metrics.captions import caption_counts, caption_scores
from finetune.data.metrics.text import FREE_TEXT, free_text
from finetune.data.sample import Answer, Message, Row, Sample
from finetune.data.tasks._columns import ask, texts_of

HEADS = ("language",)
PRIMARY = "token_f1"


class Options(PartOptions):
    prompt: str = Field("Describe the picture.", description="The question put after the media.")
    media: tuple[str, ...] = Field(
        ("image",), description="Kinds of media, each in the column of its name; [] for none."
    )
    text: str = Field("", description="Column of text put before the question; '' for none.")
    caption: str = Field("caption", description="Column of the caption, or of a list of them; the first is learnt.")
    references: str = Field("", description="Column of further captions that count as right; '' for none.")


def media(options: Options) -> tuple[str, ...]:
    return options.media


def sample(row: Row, options: Options) -> Sample:
    captions = texts_of(row, options.caption)
    if options.references:
        captions += texts_of(row, options.references)
    question = ask(row, options.prompt, options.media, (options.text,), captions[0])
    return Sample((question, Message("assistant", (captions[0],))), row.where, "caption", target=captions)


def read(answer: Answer, options: Options) -> str:
    return answer.text.strip()


def measure(prediction: str, target: list[str], options: Options) -> dict[str, Any]:
    return free_text(prediction, target) | caption_counts(prediction, target)


def score(rows: list[dict[str, Any]], options: Options) -> dict[str, float]:
    """exact_match (any of the references), and token_f1 and rouge_l against the nearest: means over rows. BLEU and chrF
    of all rows together, and CIDEr-D, whose 10 is 1 here.
    """
    return means(rows, FREE_TEXT) | caption_scores(rows)
