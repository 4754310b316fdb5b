"""One of a set of labels, from media and text. The set is what the training rows hold."""

from pydantic import Field

from finetune.data.sample import Message, Row, Sample
from finetune.parts import PartOptions

PRIMARY = "accuracy"


class Options(PartOptions):
    prompt: str = Field("What is this?", description="The question put after the media.")
    media: tuple[str, ...] = Field(
        ("image",), description="Kinds of media, each in the column of its name; [] for none."
    )
    text: str = Field("", description="Column of text put before the question; '' for none.")
    label: str = Field("label", description="Column that holds the label.")
    transcript: str = Field("", description="Column that says in words what the media show or say, for distill.")


def media(options: Options) -> tuple[str, ...]:
    return options.media


def sample(row: Row, options: Options) -> Sample:
    content = row.media(options.media, row.text(options.transcript) if options.transcript else None)
    question = f"{row.text(options.text)}\n{options.prompt}" if options.text else options.prompt
    return Sample(
        (Message("user", (*content, question)), Message("assistant", (row.text(options.label),))), row.where, "classify"
    )


def read(answer: str, options: Options) -> str:
    return answer.strip()


def score(predictions: list[str], targets: list[str], options: Options) -> dict[str, float]:
    """Accuracy, and precision, recall (balanced accuracy) and F1 averaged over the labels that occur (macro).

    An answer that is none of the labels counts as wrong, and as no label's false positive.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    labels = sorted(set(targets))
    precision, recall, f1, _ = precision_recall_fscore_support(
        targets, predictions, labels=labels, average="macro", zero_division=0.0
    )
    return {
        "accuracy": float(accuracy_score(targets, predictions)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
    }
