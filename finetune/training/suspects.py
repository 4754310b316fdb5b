"""Rows of batches whose loss or gradients weren't finite, and the file that lists them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import PartialState

from finetune.common.run_folder import add_lines, read_lines
from finetune.training.collate import Collator
from finetune.training.pack import Row

SHOWN = 3
FILE = "suspects.jsonl"  # in RUN/data


@dataclass(frozen=True)
class Suspect:
    """`row`: its file and line; `alone`: whether it gives such a value by itself; `left_out`: whether the training went
    on without it.
    """

    stage: str
    step: int
    row: str
    what: str
    alone: bool
    left_out: bool


class Suspects:
    """`rows`: of the collator's samples, in the order in which they train; `path`: the list, kept on a resume."""

    def __init__(self, path: Path, stage: str, rows: Sequence[Row], collator: Collator, accumulate: int) -> None:
        self.path, self.stage, self.rows, self.collator = path, stage, rows, collator
        self.accumulate = accumulate

    def row_of(self, steps: int, part: int) -> Row:
        """What this process was given as the `part`th (from 0) of a step, after so many steps."""
        processes = PartialState()
        place = (steps * self.accumulate + part) * processes.num_processes + processes.process_index
        row: Row = self.rows[place % len(self.rows)]
        return row

    def batch(self, groups: Row) -> Any:
        """A `Batch`."""
        return self.collator([{"groups": groups, "filler": False}])

    def units(self, row: Row) -> list[list[int]]:
        """The samples of a packed row, those that are compared with each other together."""
        together: dict[str | int, list[int]] = {}
        for number in chain.from_iterable(row):
            together.setdefault(self.collator.samples[number].group or number, []).append(number)
        return list(together.values())

    def names(self, numbers: Sequence[int]) -> list[str]:
        return [self.collator.samples[number].where for number in numbers]

    def note(self, numbers: Sequence[int], step: int, what: str, *, alone: bool, left_out: bool) -> str:
        """Add them to the list, each once a step. Returns the names of the first ones."""
        names = self.names(numbers)
        noted = [vars(Suspect(self.stage, step, name, what, alone, left_out)) for name in names]
        add_lines(self.path, [json.dumps(one, ensure_ascii=False) for one in noted])
        return self.shown(numbers)

    def shown(self, numbers: Sequence[int]) -> str:
        """The names of the first ones."""
        names = list(dict.fromkeys(self.names(numbers)))
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return f"{', '.join(names[:SHOWN])}{more}"

    def left_out(self) -> int:
        """How many rows of this stage were left out, in all of its parts."""
        found = [Suspect(**json.loads(line)) for line in read_lines(self.path)]
        return len({one.row for one in found if one.left_out and one.stage == self.stage})


def without(groups: Row, numbers: Sequence[int]) -> Row:
    """The samples of a packed row but these."""
    kept = [[number for number in group if number not in numbers] for group in groups]
    return [group for group in kept if group]
