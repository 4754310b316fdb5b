"""Answer questions about pictures that several people have answered (VQA)."""

from collections.abc import Sequence

from pydantic import Field

from finetune.data.metrics import means
from finetune.data.metrics.answers import commonest, normalised, vqa_accuracy
from finetune.data.sample import Message, Row, Sample
from finetune.data.tasks import Measure, _free_text
from finetune.data.tasks._columns import DistillableOptions, question, texts_of

HEADS = ("language",)
PRIMARY = "vqa_accuracy"


class Options(DistillableOptions):
    prompt: str = Field("", description="Text put after the row's question, like 'Answer in one word.'; '' for none.")
    question: str = Field("question", description="Column of the question, put after media and text.")
    answers: str = Field("answers", description="Column of the answers, a list; the most frequent one is learned.")
    separator: str = Field(";", description="Separator of answers that aren't a list; '' if there is one per row.")


read = _free_text.read


def sample(row: Row, options: Options) -> Sample:
    answers = texts_of(row, options.answers, options.separator)
    row.text(options.question)  # required here, unlike in the task `answer`
    turns = question(row, options, options.question), Message("assistant", (commonest(answers),))
    return Sample(turns, row.where, "vqa", target=answers)


def measure(prediction: str, target: list[str], options: Options) -> Measure:
    predicted, answers = normalised(prediction), [normalised(answer) for answer in target]
    accuracy = vqa_accuracy(predicted, answers)
    exact_match = float(predicted == normalised(commonest(target)))
    return {"good": accuracy, "exact_match": exact_match, "vqa_accuracy": accuracy}


def score(rows: Sequence[Measure], options: Options) -> dict[str, float]:
    """exact_match: share of rows that agree with the most frequent answer. vqa_accuracy: mean agreement with people's
    answers, complete if three agree. Articles, punctuation, case, and number words against digits are ignored.
    """
    return means(rows, ("exact_match", "vqa_accuracy"))
