"""From held-out rows to answers, predictions and scores: the same while training, at the end, and in a sweep."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.common.errors import ArtifactError, TrainingError
from finetune.common.registry import load_part
from finetune.data.rows import Entry, Source
from finetune.data.sample import Answer
from finetune.model.adapter import saved_asks
from finetune.model.asks import Ask, asks_of, name_of
from finetune.model.assistant import Assistant, Look
from finetune.model.features import Features
from finetune.model.tokenize import IGNORED, tokenize


def look_of(features: Features) -> Look:
    return Look(features.layout, lambda medium: features.features(medium.kind, features.key(medium)))


def known_asks(folder: Path, entries: Sequence[Entry], sources: Sequence[Source]) -> dict[str, Ask]:
    """What the adapter in `folder` was trained for, and what else the entries ask of the LLM. Raises ArtifactError
    where rows ask for a head that it lacks.
    """
    asks = saved_asks(folder)
    for entry in entries:
        source = sources[entry.source]
        name = name_of(source)
        if name not in asks:
            ask = asks_of([source], [])[name] if not load_part("heads", source.head[0]).TRAINED else None
            if ask is None:
                raise ArtifactError(f"{folder}: has no head {name!r}; it was trained for {', '.join(asks)}")
            asks[name] = ask
    return asks


def by_name(entries: Sequence[Entry], sources: Sequence[Source]) -> dict[str, list[int]]:
    """{name of the scores: numbers of the entries}."""
    result: dict[str, list[int]] = {}
    for number, entry in enumerate(entries):
        result.setdefault(name_of(sources[entry.source]), []).append(number)
    return result


def answers_to(
    assistant: Assistant,
    entries: Sequence[Entry],
    sources: Sequence[Source],
    *,
    max_new_tokens: int,
    batch: int,
    look: Look,
    step: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """What the model says to each entry's question, `batch` at once."""
    said: dict[int, Answer] = {}
    for name, numbers in by_name(entries, sources).items():
        for start in range(0, len(numbers), batch):
            chunk = numbers[start : start + batch]
            questions = [entries[i].sample.question for i in chunk]
            found = assistant.ask(name, questions, max_new_tokens=max_new_tokens, look=look)
            for i, answer in zip(chunk, found, strict=True):
                said[i] = answer
                step()
    return [said[i] for i in range(len(entries))]


@torch.no_grad()
def told(assistant: Assistant, entries: Sequence[Entry]) -> list[dict[str, float]]:
    """Of rows without media: how surprised the model is by their right answers, in nats, and of how many tokens these
    are. Before and after training: what of its language the LLM has kept.
    """
    found = []
    for entry in entries:
        tokens = tokenize(entry.sample, assistant.tokenizer, assistant.placeholders, lambda medium: ())
        device = assistant.model.get_input_embeddings().weight.device
        ids, labels = (torch.tensor([values], device=device) for values in (tokens.input_ids, tokens.labels))
        count = int((labels[:, 1:] != IGNORED).sum())
        found.append({"nats": float(assistant.model(ids, labels=labels).loss) * count, "tokens": count})
    return found


def measured(ask: Ask, entries: Sequence[Entry], answers: Sequence[Answer]) -> tuple[list[Any], list[dict[str, Any]]]:
    """The predictions that a task reads from answers, and what its `score` sums up of each."""
    kind, options = ask.task
    task = load_part("tasks", kind)
    predictions = [task.read(answer, options) for answer in answers]
    targets = [ask.target(entry.sample) for entry in entries]
    rows = [task.measure(*pair, options) for pair in zip(predictions, targets, strict=True)]
    for row, entry in zip(rows, entries, strict=True):
        if row.get("group"):  # two files may both have a user 1
            row["group"] = f"{entry.source}/{row['group']}"
    return predictions, rows


def scored(
    asks: Mapping[str, Ask], entries: Sequence[Entry], sources: Sequence[Source], answers: Sequence[Answer]
) -> dict[str, dict[str, float]]:
    """{name: {metric: value}}."""
    found = {}
    for name, numbers in by_name(entries, sources).items():
        _, rows = measured(asks[name], [entries[i] for i in numbers], [answers[i] for i in numbers])
        kind, options = asks[name].task
        found[name] = load_part("tasks", kind).score(rows, options)
    return found


def merit(scores: Mapping[str, Mapping[str, float]], asks: Mapping[str, Ask], metric: str) -> float:
    """One number that is better when higher: `metric` is NAME.METRIC, or 'mean' of the tasks' main metrics, with errors
    below zero. Raises TrainingError for a metric that there isn't.
    """
    if metric == "mean":
        values = []
        for name, found in scores.items():
            primary = load_part("tasks", asks[name].task[0]).PRIMARY
            values.append(-found[primary] if "error" in primary else found[primary])
        return sum(values) / len(values)
    name, _, key = metric.partition(".")
    if key not in scores.get(name, {}):
        there = ", ".join(f"{name}.{key}" for name, found in scores.items() for key in found)
        raise TrainingError(f"train.validation.metric: no {metric!r} on the validation rows; there are: {there}")
    return -scores[name][key] if "error" in key else scores[name][key]
