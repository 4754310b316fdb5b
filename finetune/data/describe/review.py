"""A person's decisions about described rows: kept in the rows, and what was kept of them in a file of its own."""

from pathlib import Path

from finetune.common.run_folder import JsonObject
from finetune.data.describe.assignment import ANSWER
from finetune.data.describe.rows_file import SOURCE, media_kind, write_rows
from finetune.data.formats._json import objects

REVIEW = "review"  # column: accepted, edited or rejected; none where nobody has decided
PROPOSED = "proposed"  # column of edited rows: what the model wrote


class ReviewedRows:
    """The rows of `path`; those that were accepted or edited are also in `out`. Raises DataError."""

    def __init__(self, path: Path, out: Path) -> None:
        self.path, self.out = path, out
        self.rows: list[JsonObject] = []
        self.lines: list[int] = []
        for line, row in objects(path):
            self.lines.append(line)
            self.rows.append(row)

    def medium(self, number: int) -> tuple[str, str]:
        """(kind, file as the row names it)."""
        kind = media_kind(self.rows[number])
        return kind, str(self.rows[number][kind])

    def question(self, number: int) -> str:
        row = self.rows[number]
        return str(row.get("question") or row[SOURCE]["prompt"])

    def answer(self, number: int) -> str:
        column, row = self._column(number), self.rows[number]
        return str(row[column][0] if isinstance(row[column], list) else row[column])

    def proposed(self, number: int) -> str:
        """What the model wrote."""
        return str(self.rows[number].get(PROPOSED) or self.answer(number))

    def decision(self, number: int) -> str:
        """accepted, edited, rejected, or '' for none yet."""
        return str(self.rows[number].get(REVIEW) or "")

    def decide(self, number: int, answer: str | None) -> None:
        """Keep the row with this answer, or reject it (None), or take a decision back ('')."""
        row, proposed = self.rows[number], self.proposed(number)
        for column in (REVIEW, PROPOSED):
            row.pop(column, None)
        self._write(number, answer or proposed)
        if answer is None:
            row[REVIEW] = "rejected"
        elif answer:
            row |= {REVIEW: "accepted"} if answer == proposed else {REVIEW: "edited", PROPOSED: proposed}
        self.save()

    def save(self) -> None:
        write_rows(self.path, self.rows)
        write_rows(self.out, [row for row in self.rows if row.get(REVIEW) in ("accepted", "edited")])

    def _column(self, number: int) -> str:
        return next(column for column in ANSWER.values() if column in self.rows[number])

    def _write(self, number: int, answer: str) -> None:
        column, row = self._column(number), self.rows[number]
        row[column] = [answer] if isinstance(row[column], list) else answer
