"""The file that `finetune predict` writes: a .csv or .jsonl with a line for each row, appended as answers come."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from finetune.common.errors import OVERWRITE, DataError, RecipeError, given, option
from finetune.common.run_folder import replacing
from finetune.data.questions import Input

PROBABILITY = "probability_"  # beginning of the column of a label's probability
MAX_FIELD = 2**28  # characters of a field that is read back


@dataclass(frozen=True)
class PredictedRow:
    """`row`: the file, or for a row of a table the table's name and the line. `columns`: as the table holds them.
    `answer`: text, a label or labels, a number, or fields, as the task reads it, or where it can't, the text that the
    model wrote; None where there is no answer, for the reason in `error`. `probabilities`: of each label, where the
    model gives them. `rank`: within its group, from 1 for the best, where the task ranks and all rows have been asked.
    """

    row: str
    columns: Mapping[str, str]
    answer: Any = None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    rank: int | None = None

    @property
    def answer_text(self) -> str:
        """The answer as a table holds it: text as it is, anything else as JSON."""
        if self.answer is None:
            return ""
        return self.answer if isinstance(self.answer, str) else json.dumps(self.answer, ensure_ascii=False)


class AnswersFile:
    """`inputs`: all rows that it is for; `labels`: those with probabilities; `ranks`: whether rows have a rank;
    `answer_of`: what a table's text of an answer stands for.
    """

    def __init__(
        self,
        path: Path,
        inputs: Sequence[Input],
        labels: Sequence[str],
        answer_of: Callable[[str], Any],
        ranks: bool = False,
    ) -> None:
        self.path, self.answer_of, self.ranks = path, answer_of, ranks
        self.jsonl = path.suffix.lower() == ".jsonl"
        names = list(dict.fromkeys(name for one in inputs for name in one.columns))
        first = "row" if names else "file"
        of_labels = [f"{PROBABILITY}{label}" for label in labels]
        ours = ["answer", *(["rank"] if ranks else []), *of_labels, "error"]
        self.inputs = {one.name: one for one in inputs}
        self.first, self.labels = first, tuple(labels)
        reserved = {first, *ours, "probabilities"}
        taken = {*reserved, *names}
        self.kept = {name: _free(name, taken) if name in reserved else name for name in names}  # -> its name here
        self.header = [first, *self.kept.values(), *ours]

    def answered(self) -> dict[str, PredictedRow]:
        """The rows that an interrupted earlier call has answered; a torn last line isn't. Raises DataError where the
        file is of other rows, or finished.
        """
        if not self.path.exists():
            return {}
        with self.path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            text = file.read()
        rows = self._read_jsonl(text) if self.jsonl else self._read_csv(text)
        for row in rows:
            known = self.inputs.get(row.row)
            if known is None or {name: known.columns.get(name, "") for name in self.kept} != row.columns:
                raise self._foreign(f"its row {row.row!r} isn't among these, or has changed")
        done = {row.row: row for row in rows if not row.error}
        ranked = not self.ranks or any(row.rank for row in rows)
        if len(done) == len(self.inputs) and ranked:
            raise DataError(f"{self.path}: all {len(done):,} rows are answered in it; {option(*OVERWRITE)} begins anew")
        return done

    @contextmanager
    def appending(self, done: Sequence[PredictedRow]) -> Iterator[Callable[[PredictedRow], None]]:
        """The file with the rows `done`, and a function that writes a further one to disk."""
        with replacing(self.path, newline="", errors="backslashreplace") as file:
            if not self.jsonl:
                file.write("\ufeff")  # Excel reads UTF-8 with its mark
                csv.writer(file).writerow(self.header)
            for row in done:
                self._write(file, row)
        with self.path.open("a", encoding="utf-8", newline="", errors="backslashreplace") as file:

            def append(row: PredictedRow) -> None:
                self._write(file, row)
                file.flush()

            yield append

    def _write(self, file: TextIO, row: PredictedRow) -> None:
        kept = {here: row.columns.get(name, "") for name, here in self.kept.items()}
        if self.jsonl:
            line = {self.first: row.row, **kept, "answer": row.answer} | ({"rank": row.rank} if self.ranks else {})
            line |= {"probabilities": dict(row.probabilities)} if self.labels else {}
            file.write(json.dumps(line | {"error": row.error}, ensure_ascii=False) + "\n")
            return
        shares = [f"{row.probabilities[label]:.4f}" if row.probabilities else "" for label in self.labels]
        ranks = [row.rank] if self.ranks else []
        cells = [row.row, *kept.values(), row.answer_text, *ranks, *shares, row.error]
        csv.writer(file).writerow(cells)

    def _read_csv(self, text: str) -> list[PredictedRow]:
        csv.field_size_limit(MAX_FIELD)
        records: list[list[str]] = []
        try:
            records.extend(csv.reader(io.StringIO(text, newline=""), strict=True))
        except csv.Error:  # torn within a quoted field
            pass
        else:
            if not text.endswith("\n"):
                records.pop()
        if not records or records[0] != self.header:
            raise self._foreign("its columns are others")
        return self._rows(lambda record: dict(zip(self.header, record, strict=True)), records[1:], "record")

    def _read_jsonl(self, text: str) -> list[PredictedRow]:
        return self._rows(json.loads, text.split("\n")[:-1], "line")

    def _rows(self, cells_of: Callable[[Any], dict[str, Any]], entries: Sequence[Any], unit: str) -> list[PredictedRow]:
        rows = []
        for number, entry in enumerate(entries, 1):
            try:
                rows.append(self._row(cells_of(entry)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self._foreign(f"{unit} {number} holds something else ({error!r})") from None
        return rows

    def _row(self, cells: dict[str, Any]) -> PredictedRow:
        columns = {name: cells[here] for name, here in self.kept.items()}
        if self.jsonl:
            answer, probabilities = cells["answer"], cells.get("probabilities", {})
        else:
            answer = None if cells["error"] else self.answer_of(cells["answer"])
            shares = {label: cells[f"{PROBABILITY}{label}"] for label in self.labels}
            probabilities = {label: float(share) for label, share in shares.items() if share}
        rank = int(cells["rank"]) if self.ranks and cells["rank"] else None
        return PredictedRow(cells[self.first], columns, answer, probabilities, cells["error"], rank)

    def _foreign(self, reason: str) -> DataError:
        return DataError(
            f"{self.path}: already exists and isn't an unfinished answers file for these rows: {reason}; name another "
            f"file with {option('--out', 'out=')}, or give {option(*OVERWRITE)}"
        )


def _free(name: str, taken: set[str]) -> str:
    """The name with as many `input_` before it as make it a new one, which is taken then."""
    while name in taken:
        name = f"input_{name}"
    taken.add(name)
    return name


def refuse_other_suffixes(path: Path) -> None:
    """Raises RecipeError."""
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise RecipeError(f"{given('out', path)}: write a file that ends in .csv or .jsonl")
