"""Preferences in rows: a chosen and a rejected answer, or whether an answer is desirable."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from finetune.data.formats import Columns
from finetune.data.sample import Answer, Row, Sample
from finetune.recipe.parts import Needs, TaskPart
from finetune.recipe.schema import Source

WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def sample_of(row: Row, task: TaskPart) -> Sample:
    """The task's sample of a row, with the answer of its column `rejected`, or the label in `desirable`. A column
    `chosen` is the answer where the row has no other. Raises DataError.
    """
    columns = row.columns
    if isinstance(chosen := columns.get("chosen"), str):
        row = replace(row, columns=_answered(row, task, chosen))
    sample: Sample = task.sample(row)
    rejected, label = _text(columns.get("rejected")), columns.get("desirable")
    label = label if isinstance(label, bool) else WORDS.get(str(label).strip().lower())
    if rejected is None and label is None:
        return sample
    return replace(sample, rejected=rejected, desirable=label)


def _answered(row: Row, task: TaskPart, chosen: str) -> Columns:
    """The columns of a row with the chosen answer in the place of one that is missing."""
    answer: Columns = {}
    for name, value in task.module.stand_in(row, task.options).items():
        if name == "messages":
            answer[name] = [*value[:-1], {"role": "assistant", "content": chosen}]
        else:
            answer[name] = [chosen] if isinstance(value, list) else chosen
    return answer | {name: value for name, value in row.columns.items() if value not in (None, "")}


def _text(value: Any) -> str | None:
    if isinstance(value, bool | int | float | dict | list):
        value = json.dumps(value, ensure_ascii=False)
    return value.strip() or None if isinstance(value, str) else None


def without_reward(sample: Sample, task: TaskPart, name: str) -> str | None:
    """Which numbers the sample's task measures, where none of them has this name."""
    right = task.read(Answer(sample.answer))
    measure = task.measure(right, right if sample.target is None else sample.target)
    numbers = [key for key, value in measure.items() if isinstance(value, int | float)]
    known = " or ".join(numbers)
    return None if name in numbers else f"the task {task.kind!r} measures no {name!r}; write reward: {known}"


def unfit(samples: Iterable[Sample], needs: Needs, sources: Sequence[Source]) -> Iterator[tuple[Sample, str]]:
    """Which samples of a recipe's sources an objective with these needs can't learn from, and why."""
    for sample in samples:
        if needs == "unpaired" and sample.desirable is None:
            yield sample, f"no label; write true or false in {_column(sample, sources, 'desirable')}"
        if needs != "pairs":
            continue
        if sample.rejected is None:
            yield sample, f"no rejected answer; write one in {_column(sample, sources, 'rejected')}"
        elif sample.rejected == sample.answer.strip():
            yield sample, "chosen and rejected are the same answer; leave the row out"


def _column(sample: Sample, sources: Sequence[Source], name: str) -> str:
    """Where a row's value stands in its file."""
    theirs = sources[sample.source].columns.get(name)
    return f"the column {theirs!r}, which `columns` names for {name!r}" if theirs else f"a column {name!r}"
