"""The same held-out questions asked of a model here and as it was downloaded again."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.common.errors import DataError
from finetune.common.run_folder import RunFolder
from finetune.data.rows import Entry, Source, read_splits, some
from finetune.evaluation.scores import by_name, measured
from finetune.model.assistant import Assistant

ROWS = 16  # of each task, at most


@dataclass(frozen=True)
class Questions:
    """`groups`: {name of the scores: entries, asked as one batch}; `evaluated`: what predictions.jsonl has of them."""

    groups: Mapping[str, Sequence[Entry]]
    evaluated: Mapping[str, Sequence[Any]]
    max_new_tokens: int

    def __len__(self) -> int:
        return sum(map(len, self.groups.values()))

    def asked_of(self, assistant: Assistant) -> dict[str, list[Any]]:
        """{name: predictions}."""
        said = {}
        for name, entries in self.groups.items():
            questions = [entry.sample.question for entry in entries]
            answers = assistant.ask(name, questions, max_new_tokens=self.max_new_tokens)
            said[name] = measured(assistant.model.asks[name], entries, answers)[0]
        return said


def questions_of(
    folder: RunFolder,
    sources: Sequence[Source],
    known: Sequence[str],
    *,
    seed: int,
    split: str,
    limit: int | None,
    batch: int,
    max_new_tokens: int,
) -> Questions:
    """The first evaluated rows of each task that the model knows (`known`), in the batches of `finetune evaluate`: in
    others they may round otherwise. Raises DataError where the rows aren't those that were evaluated.
    """
    entries = some(read_splits(sources, seed)[split], limit, seed)
    lines = folder.predictions.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    if [row["row"] for row in rows] != [entry.sample.where for entry in entries]:
        raise DataError(f"{folder.predictions}: isn't of the rows that there are now; run `finetune evaluate` again")
    chosen = {name: numbers[: min(batch, ROWS)] for name, numbers in by_name(entries, sources).items() if name in known}
    return Questions(
        {name: [entries[i] for i in numbers] for name, numbers in chosen.items()},
        {name: [rows[i]["tuned"] for i in numbers] for name, numbers in chosen.items()},
        max_new_tokens,
    )


def equal(left: Mapping[str, Sequence[Any]], right: Mapping[str, Sequence[Any]]) -> int:
    """How many predictions are the same: text to the letter, numbers and probabilities to three digits."""
    return sum(_same(a, b) for name in left for a, b in zip(left[name], right[name], strict=True))


def differences(
    questions: Questions, left: Mapping[str, Sequence[Any]], right: Mapping[str, Sequence[Any]]
) -> list[tuple[str, Any, Any]]:
    """(row, left, right) of those that aren't the same."""
    return [
        (entry.sample.where, a, b)
        for name, entries in questions.groups.items()
        for entry, a, b in zip(entries, left[name], right[name], strict=True)
        if not _same(a, b)
    ]


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, float | int) and isinstance(right, float | int):
        return math.isclose(left, right, rel_tol=1e-3, abs_tol=1e-3) or (math.isnan(left) and math.isnan(right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)
