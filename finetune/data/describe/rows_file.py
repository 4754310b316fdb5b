"""The file of described rows: JSON lines with the columns of a task and a `source`: where each row is from."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from finetune.common.errors import OVERWRITE, DataError, option
from finetune.common.run_folder import JsonObject, replacing
from finetune.data.describe.assignment import Assignment
from finetune.data.formats._json import objects
from finetune.data.formats._media import KINDS

SOURCE = "source"  # its column


@dataclass(frozen=True)
class Origin:
    """Where a row is from. `model`: a folder, a Hub id, or the name at the `address` of an endpoint; `revision`: its
    commit or the hash of its weights, or what the endpoint calls its state, '' where that is unknown; `date`: of the
    answer, ISO 8601, UTC.
    """

    model: str
    revision: str
    address: str
    prompt: str
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def is_described(path: Path) -> bool:
    """Whether a file holds rows with a `source` as here."""
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return False
    try:
        _, first = next(objects(path))
    except (DataError, StopIteration, OSError, UnicodeError):
        return False
    source = first.get(SOURCE)
    return isinstance(source, dict) and source.keys() == Origin.__dataclass_fields__.keys()


class RowsFile:
    """`kind`: of the media, whose column names each row's file."""

    def __init__(self, path: Path, kind: str, assignment: Assignment) -> None:
        self.path, self.kind, self.assignment = path, kind, assignment

    def begun(self) -> list[JsonObject]:
        """The rows of an earlier call, without those that it was about to write when it was stopped. Raises DataError
        where the file holds other rows.
        """
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        *lines, torn = text.split("\n")
        rows = [self._row(number, line) for number, line in enumerate(lines, 1)]
        of_last = [row for row in rows if row[self.kind] == rows[-1][self.kind]] if rows else []
        if torn or len(of_last) < (self.assignment.questions or 1):
            rows = [row for row in rows if row not in of_last] if self.assignment.questions else rows
        return rows

    def _row(self, number: int, line: str) -> JsonObject:
        try:
            row: JsonObject = json.loads(line)
            expected = self.assignment.rows(self.kind, row[self.kind], "Q: ?\nA: ?")[0].keys()
            if row[SOURCE]["prompt"] != self.assignment.wording(self.kind):
                raise DataError(f"line {number} answers another prompt, {row[SOURCE]['prompt'][:80]!r}")
            if not expected <= row.keys():
                raise DataError(f"line {number} has no {', '.join(sorted(expected - row.keys()))}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._foreign(f"line {number} is none of its rows ({error!r})") from None
        except DataError as error:
            raise self._foreign(str(error)) from None
        return row

    def _foreign(self, reason: str) -> DataError:
        return DataError(
            f"{self.path}: exists, and isn't a file of these answers: {reason}; name another file with "
            f"{option('--out', 'out=')}, or begin anew with {option(*OVERWRITE)}"
        )

    @contextmanager
    def appending(self, begun: Sequence[JsonObject]) -> Iterator[Callable[[Sequence[JsonObject], Origin], None]]:
        """The file with the rows `begun`, and a function that puts further ones, of one medium, on disk at once."""
        write_rows(self.path, begun)
        with self.path.open("a", encoding="utf-8", newline="\n") as file:

            def append(rows: Sequence[JsonObject], origin: Origin) -> None:
                file.write("".join(_line(row | {SOURCE: asdict(origin)}) for row in rows))
                file.flush()

            yield append


def write_rows(path: Path, rows: Sequence[JsonObject]) -> None:
    """Replace a file, whole or not at all."""
    with replacing(path, newline="\n") as file:
        file.writelines(map(_line, rows))


def media_kind(row: JsonObject) -> str:
    """The column that names a described row's file."""
    return next(kind for kind in row if kind in KINDS.values())


def _line(row: JsonObject) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
