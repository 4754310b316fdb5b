"""Describe a picture, a recording or a video in words."""

from collections.abc import Sequence

from pydantic import Field

from finetune.data.formats import Columns
from finetune.data.metrics.captions import caption_counts, caption_scores
from finetune.data.sample import Message, Row, Sample
from finetune.data.tasks import Measure, Prompt, _free_text
from finetune.data.tasks._columns import QuestionOptions, listed, texts_of, user_turn

HEADS = ("language",)
PRIMARY = "token_f1"


class Options(QuestionOptions):
    prompt: Prompt = "Describe the picture."
    caption: str = Field("caption", description="Column of the caption, or a list of captions; the first is learned.")
    references: str = Field("", description="Column of further captions that count as right; '' for none.")


read = _free_text.read


def sample(row: Row, options: Options) -> Sample:
    captions = texts_of(row, options.caption)
    if options.references:
        captions += texts_of(row, options.references)
    question = user_turn(row, options.media, listed(options.text), options.prompt, transcript=captions[0])
    return Sample((question, Message("assistant", (captions[0],))), row.where, "caption", target=captions)


def stand_in(row: Row, options: Options) -> Columns:
    return {options.caption: "?"} | ({options.references: "?"} if options.references else {})


def measure(prediction: str, target: list[str], options: Options) -> Measure:
    return _free_text.measure(prediction, target, options) | caption_counts(prediction, target)


def score(rows: Sequence[Measure], options: Options) -> dict[str, float]:
    """The scores of free text against the nearest reference; BLEU and chrF of all rows together, 0 to 1; and CIDEr-D
    divided by 10.
    """
    return _free_text.score(rows, options) | caption_scores(rows)
