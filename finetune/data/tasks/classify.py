"""One of a set of labels, or several of them, from media and text."""

from typing import Any, Self

from pydantic import Field, model_validator

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.data.metrics import means
from finetune.data.metrics.labels import (
    fold,
    label_scores,
    label_tables,
    labelled,
    probability_scores,
    with_probabilities,
)
from finetune.data.sample import Answer, Message, Row, Sample
from finetune.data.tasks._columns import ask, split_at, text_of, texts_of, transcript_of

HEADS = ("language", "label")
PRIMARY = "accuracy"


class Options(PartOptions):
    prompt: str = Field("What is this?", description="The question put after the media.")
    media: tuple[str, ...] = Field(
        ("image",), description="Kinds of media, each in the column of its name; [] for none."
    )
    text: str = Field("", description="Column of text put before the question; '' for none.")
    label: str = Field("label", description="Column that holds the label, or the labels.")
    labels: tuple[str, ...] = Field((), description="The labels there are; [] for those that the training rows hold.")
    separator: str = Field("", description="What stands between a row's labels, like ';'; '' where each row has one.")
    transcript: str = Field("", description="Column that says in words what the media show or say, for distill.")

    @model_validator(mode="after")
    def _labels_can_be_told_apart(self) -> Self:
        seen: dict[str, str] = {}
        for label in self.labels:
            if split_at(label, self.separator) != [label]:
                raise ValueError(
                    f"labels: {label!r} is empty, holds the separator, or has spaces around it; write another."
                )
            if other := seen.get(fold(label)):
                raise ValueError(f"labels: {other!r} and {label!r} differ in case or a full stop alone; keep one.")
            seen[fold(label)] = label
        return self


def media(options: Options) -> tuple[str, ...]:
    return options.media


def sample(row: Row, options: Options) -> Sample:
    labels = _labels_of(row, options)
    question = ask(row, options.prompt, options.media, (options.text,), transcript_of(row, options.transcript))
    gap = " " if options.separator.isascii() and not options.separator.endswith(" ") else ""
    answer = f"{options.separator}{gap}".join(labels)
    target = labels if options.separator else None
    return Sample((question, Message("assistant", (answer,))), row.where, "classify", target=target)


def read(answer: Answer, options: Options) -> Any:
    """A label, or a sorted list of them with a `separator`; {"label": either, "probabilities": {label: p}} where a head
    gives probabilities: the likeliest, or all that are as likely as not. None where nothing was said.
    """
    if answer.probabilities is not None:
        chances: dict[str, float] = {}
        for said, chance in answer.probabilities.items():
            for label in split_at(
                said, options.separator
            ):  # a label's own chance, or that of all answers that it is one of
                chances[label] = min(chances.get(label, 0.0) + float(chance), 1.0)
        several = sorted(label for label, chance in chances.items() if chance >= 0.5)
        likeliest = several if options.separator else max(chances, key=chances.__getitem__)
        return {"label": likeliest, "probabilities": chances}
    labels = _spelled(split_at(answer.text, options.separator), options)
    return (labels if options.separator else labels[0]) if labels else None


def measure(prediction: Any, target: Any, options: Options) -> dict[str, Any]:
    said = prediction["label"] if isinstance(prediction, dict) else prediction
    row = labelled(*(_listed(labels) for labels in (said, target)))
    return with_probabilities(row, prediction["probabilities"]) if isinstance(prediction, dict) else row


def score(rows: list[dict[str, Any]], options: Options) -> dict[str, float]:
    """Accuracy; precision, recall and F1 averaged over the labels that are right in some row (macro), and F1 over all
    decisions (micro). An answer that is none of the labels counts as wrong, and as no label's false positive. With
    probabilities also AUROC (each label against the rest) and calibration error.

    Where rows have one label, balanced_accuracy is the mean recall. Where they have several, accuracy is the mean share
    of labels in common (Godbole & Sarawagi 2004), and exact_match counts the rows with all labels right and no other.
    """
    several = bool(options.separator)
    found = label_scores(rows)
    if not several and found:
        found["balanced_accuracy"] = found["recall"]
    return {
        "accuracy": means(rows, ("good",))["good"],
        **(means(rows, ("exact_match",)) if several else {}),
        **found,
        **probability_scores(rows, several),
    }


def tables(rows: list[dict[str, Any]], options: Options) -> dict[str, Any]:
    """Confusion (rows of one label) and each label's scores."""
    known = options.labels or tuple(dict.fromkeys(label for row in rows for label in row.get("labels", ())))
    return label_tables(rows, known, bool(options.separator))


def _labels_of(row: Row, options: Options) -> list[str]:
    if isinstance(row.columns.get(options.label), list) and not options.separator:
        raise DataError(f"{row.where}: column {options.label!r} holds a list; for several labels set task.separator")
    found = texts_of(row, options.label, options.separator) if options.separator else [text_of(row, options.label)]
    labels = _spelled(found, options)
    wrong = [label for label in labels if options.labels and label not in options.labels]
    if wrong:
        there = ", ".join(options.labels)
        raise DataError(f"{row.where}: column {options.label!r} holds {wrong[0]!r}; labels are: {there[:300]}")
    return labels


def _spelled(labels: list[str], options: Options) -> list[str]:
    """Sorted, each once, as the options spell them."""
    spelled = {fold(label): label for label in options.labels}
    return sorted({fold(label): spelled.get(fold(label), label) for label in labels}.values())


def _listed(labels: str | list[str] | None) -> list[str]:
    return [labels] if isinstance(labels, str) else labels or []
