"""The same held-out questions, put to a model here and to its copy downloaded from the Hub."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.common.errors import DataError
from finetune.common.run_folder import RunFolder, read_json
from finetune.data.rows import Entry, read_splits, some
from finetune.data.sources import sources_of
from finetune.evaluation.scores import by_name, measured
from finetune.model.assistant import Assistant
from finetune.recipe.schema import Recipe

ROWS = 16  # of each task, at most

Predictions = Mapping[str, Sequence[object]]  # task binding -> prediction of each row


@dataclass(frozen=True)
class Questions:
    """`entries`: task binding -> rows, answered as one batch; `evaluated`: their predictions in predictions.jsonl."""

    entries: Mapping[str, Sequence[Entry]]
    evaluated: Predictions
    max_new_tokens: int

    def __len__(self) -> int:
        return sum(map(len, self.entries.values()))

    def predictions_of(self, assistant: Assistant) -> Predictions:
        predictions = {}
        for name, entries in self.entries.items():
            questions = [entry.sample.question for entry in entries]
            answers = assistant.ask(name, questions, max_new_tokens=self.max_new_tokens)
            predictions[name] = measured(assistant.model.asks[name], entries, answers)[0]
        return predictions


def questions_of(folder: RunFolder, recipe: Recipe) -> Questions:
    """The first evaluated rows of each task that the adapter was trained for, in the batches of `finetune evaluate`:
    other batches may round otherwise. Raises DataError if the rows have changed since the evaluation.
    """
    sources, options = sources_of(recipe), recipe.evaluate
    entries = some(read_splits(sources, recipe.seed)[options.split], options.limit, recipe.seed)
    rows = [json.loads(line) for line in folder.predictions.read_text(encoding="utf-8").splitlines()]
    if [row["row"] for row in rows] != [entry.sample.where for entry in entries]:
        raise DataError(f"{folder.predictions}: isn't of the present rows; run `finetune evaluate` again")
    trained = read_json(folder.adapter / "multimodal.json")["asks"]
    chosen = {
        name: numbers[: min(options.batch, ROWS)]
        for name, numbers in by_name(entries, sources).items()
        if name in trained
    }
    return Questions(
        {name: [entries[i] for i in numbers] for name, numbers in chosen.items()},
        {name: [rows[i]["tuned"] for i in numbers] for name, numbers in chosen.items()},
        options.max_new_tokens,
    )


def differences(questions: Questions, left: Predictions, right: Predictions) -> list[tuple[str, object, object]]:
    """(row, left, right) of unequal predictions: text must be equal to the letter, numbers and probabilities to three
    digits.
    """
    return [
        (entry.sample.where, a, b)
        for name, entries in questions.entries.items()
        for entry, a, b in zip(entries, left[name], right[name], strict=True)
        if not _same(a, b)
    ]


def _same(left: object, right: object) -> bool:
    if isinstance(left, float | int) and isinstance(right, float | int):
        return math.isclose(left, right, rel_tol=1e-3, abs_tol=1e-3) or (math.isnan(left) and math.isnan(right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)
