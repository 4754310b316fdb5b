"""Choose one label, or several, for the media and text of a row."""

from collections.abc import Sequence
from typing import Self, TypeAlias, TypedDict

from pydantic import Field, model_validator

from finetune.common.errors import DataError
from finetune.data.formats import Columns
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
from finetune.data.tasks import Measure, Prompt, Tables
from finetune.data.tasks._columns import DistillableOptions, question, split_at, texts_of

HEADS = ("language", "label")
PRIMARY = "accuracy"


class Options(DistillableOptions):
    prompt: Prompt = "What is this?"
    label: str = Field("label", description="Column of the label, or the labels.")
    labels: tuple[str, ...] = Field((), description="All labels; []: those of the training rows.")
    separator: str = Field("", description="Separator of a row's labels, like ';'; '' if each row has one.")

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        labels: dict[str, str] = {}
        for label in self.labels:
            if split_at(label, self.separator) != [label]:
                raise ValueError(
                    f"labels: {label!r} is empty, contains the separator, or has spaces around it; write another."
                )
            if other := labels.get(fold(label)):
                raise ValueError(f"labels: {other!r} and {label!r} differ only in case or a full stop; keep one.")
            labels[fold(label)] = label
        return self


class Choice(TypedDict):
    label: str | list[str]
    probabilities: dict[str, float]


Prediction: TypeAlias = str | list[str] | Choice | None


def sample(row: Row, options: Options) -> Sample:
    labels = _labels_of(row, options)
    gap = " " if options.separator.isascii() and not options.separator.endswith(" ") else ""
    answer = f"{options.separator}{gap}".join(labels)
    target = labels if options.separator else None
    turns = question(row, options), Message("assistant", (answer,))
    return Sample(turns, row.where, "classify", target=target)


def stand_in(row: Row, options: Options) -> Columns:
    return {options.label: options.labels[0] if options.labels else "?"}


def read(answer: Answer, options: Options) -> Prediction:
    """A label, or with a `separator` a sorted list of labels; a `Choice` if the head gives probabilities: the most
    probable label, or all of at least one half. None if the answer is empty.
    """
    if answer.probabilities is not None:
        # A label's own probability; or the sum over the answers that contain it, if an answer is a list of labels.
        probabilities: dict[str, float] = {}
        for text, probability in answer.probabilities.items():
            for label in split_at(text, options.separator):
                probabilities[label] = min(probabilities.get(label, 0.0) + float(probability), 1.0)
        if options.separator:
            chosen = sorted(label for label, probability in probabilities.items() if probability >= 0.5)
            return {"label": chosen, "probabilities": probabilities}
        return {"label": max(probabilities, key=probabilities.__getitem__), "probabilities": probabilities}
    labels = _as_spelled(split_at(answer.text, options.separator), options)
    return (labels if options.separator else labels[0]) if labels else None


def measure(prediction: Prediction, target: str | list[str] | None, options: Options) -> Measure:
    if isinstance(prediction, dict):
        row = labelled(_as_list(prediction["label"]), _as_list(target))
        return with_probabilities(row, prediction["probabilities"])
    return labelled(_as_list(prediction), _as_list(target))


def score(rows: Sequence[Measure], options: Options) -> dict[str, float]:
    """Accuracy; precision, recall and F1 averaged over the labels that are right in some row (macro), and F1 over all
    decisions (micro). An answer that is none of the labels is wrong, and no label's false positive. With probabilities
    also AUROC (each label against the rest) and calibration error.

    With one label per row, balanced_accuracy is the mean recall. With several, accuracy is the mean share of labels in
    common (Godbole & Sarawagi 2004), and exact_match the share of rows with all right labels and no other.
    """
    several = bool(options.separator)
    scores = label_scores(rows)
    if not several and scores:
        scores["balanced_accuracy"] = scores["recall"]
    return {
        "accuracy": means(rows, ("good",))["good"],
        **(means(rows, ("exact_match",)) if several else {}),
        **scores,
        **probability_scores(rows, several),
    }


def tables(rows: Sequence[Measure], options: Options) -> Tables:
    """The scores of each label, and with one label per row the confusion."""
    labels = options.labels or tuple(dict.fromkeys(label for row in rows for label in row.get("labels", ())))
    return label_tables(rows, labels, bool(options.separator))


def _labels_of(row: Row, options: Options) -> list[str]:
    if isinstance(row.columns.get(options.label), list) and not options.separator:
        raise DataError(f"{row.where}: {row.called(options.label)} holds a list; for several labels set task.separator")
    texts = texts_of(row, options.label, options.separator) if options.separator else [row.text(options.label)]
    labels = _as_spelled(texts, options)
    wrong = [label for label in labels if options.labels and label not in options.labels]
    if wrong:
        known = ", ".join(options.labels)
        raise DataError(f"{row.where}: {row.called(options.label)} holds {wrong[0]!r}; labels are: {known[:300]}")
    return labels


def _as_spelled(labels: list[str], options: Options) -> list[str]:
    """Sorted, without duplicates, spelled as in the options."""
    spelled = {fold(label): label for label in options.labels}
    return sorted({fold(label): spelled.get(fold(label), label) for label in labels}.values())


def _as_list(labels: str | list[str] | None) -> list[str]:
    return [labels] if isinstance(labels, str) else labels or []
