"""Answer a question about media, a different one in each row."""

from pydantic import Field

from finetune.data.sample import Message, Row, Sample
from finetune.data.tasks import _free_text
from finetune.data.tasks._columns import DistillableOptions, question

HEADS = ("language",)
PRIMARY = "exact_match"


class Options(DistillableOptions):
    prompt: str = Field("", description="Text put after the row's question; '' for none.")
    question: str = Field("question", description="Column of the question, put after media and text; '' for none.")
    answer: str = Field("answer", description="Column of the answer.")


read, measure, score = _free_text.read, _free_text.measure, _free_text.score


def sample(row: Row, options: Options) -> Sample:
    turns = question(row, options, options.question), Message("assistant", (row.text(options.answer),))
    return Sample(turns, row.where, "answer")
