"""The same held-out questions, put to a model here and to its copy downloaded from the Hub."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.common.errors import DataError
from finetune.common.run_folder import RunFolder
from finetune.data.predictions import read_predictions
from finetune.data.rows import by_task, subset
from finetune.data.run_rows import splits_of_run
from finetune.data.sample import Sample
from finetune.evaluation.scores import measured
from finetune.model.assistant import Assistant
from finetune.model.manifest import AdapterManifest
from finetune.recipe.load import Recipe

ROWS = 16  # of each task, at most

Predictions = Mapping[str, Sequence[object]]  # task binding -> prediction of each row


@dataclass(frozen=True)
class HeldOutQuestions:
    """`samples`: task binding -> rows, answered as one batch; `evaluated`: their predictions in predictions.jsonl."""

    samples: Mapping[str, Sequence[Sample]]
    evaluated: Predictions
    max_new_tokens: int

    def __len__(self) -> int:
        return sum(map(len, self.samples.values()))

    def predictions_of(self, assistant: Assistant) -> Predictions:
        predictions = {}
        for name, samples in self.samples.items():
            questions = [sample.question for sample in samples]
            answers = assistant.ask(name, questions, max_new_tokens=self.max_new_tokens)
            predictions[name] = measured(assistant.model.bindings[name], samples, answers)[0]
        return predictions


def questions_of(folder: RunFolder, recipe: Recipe) -> HeldOutQuestions:
    """The first evaluated rows of each task that the adapter was trained for, in the batches of `finetune evaluate`:
    other batches may round otherwise. Raises DataError if the rows have changed since the evaluation.
    """
    options = recipe.evaluate
    splits = splits_of_run(folder, recipe)
    samples = subset(splits.of(options.split), options.limit, recipe.seed)
    predictions = read_predictions(folder.predictions)
    if [prediction.row for prediction in predictions] != [sample.where for sample in samples]:
        raise DataError(f"{folder.predictions}: isn't of the present rows; run `finetune evaluate` again")
    trained = AdapterManifest.read(folder.adapter).bindings
    chosen = {
        name: numbers[: min(options.batch, ROWS)] for name, numbers in by_task(samples).items() if name in trained
    }
    return HeldOutQuestions(
        {name: [samples[i] for i in numbers] for name, numbers in chosen.items()},
        {name: [predictions[i].answers["tuned"] for i in numbers] for name, numbers in chosen.items()},
        options.max_new_tokens,
    )


def differences(questions: HeldOutQuestions, left: Predictions, right: Predictions) -> list[tuple[str, object, object]]:
    """(row, left, right) of unequal predictions: text must be equal to the letter, numbers and probabilities to three
    digits.
    """
    return [
        (sample.where, a, b)
        for name, samples in questions.samples.items()
        for sample, a, b in zip(samples, left[name], right[name], strict=True)
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
