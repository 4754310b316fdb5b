"""What is wrong with the rows of a source: every fault with its file and row, and a missing column once."""

import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from finetune.common.errors import DataError, MissingColumn, option
from finetune.common.registry import nearest
from finetune.data.formats._media import kind_of_values
from finetune.data.preferences import sample_of
from finetune.data.sample import KINDS, Row, Sample
from finetune.recipe.schema import Source

SHOWN = 20  # faults listed at once
ROWS_READ = 50  # to tell what a column holds


class Faults:
    """The faults of one source. `key`: its key in the recipe, where its file alone doesn't tell which it is.
    `in_recipe`: whether a recipe names it; else an option of a command does.
    """

    def __init__(self, source: Source, key: str = "", in_recipe: bool = True) -> None:
        self.source, self.key, self.in_recipe = source, key, in_recipe
        self.texts: list[tuple[str, str]] = []  # (place, what is wrong there)
        self._missing: dict[tuple[str, ...], list[Row]] = defaultdict(list)

    def unreadable(self, line: int, text: str, raw: str) -> None:
        """What `lenient_rows` reports."""
        name = None
        if raw.lstrip().startswith("{"):
            with suppress(ValueError, AttributeError, RecursionError):
                name = json.loads(raw).get("id")
        self.add(text, f"{self.source.path.name}:{line}", name)

    def unusable(self, row: Row, error: DataError) -> None:
        if isinstance(error, MissingColumn):
            self._missing[missing_columns(self.source, row, error)].append(row)
        else:
            self.add(str(error), row.where, row.columns.get("id"))

    def add(self, text: str, where: str, name: object = None) -> None:
        """`text`: it may begin with the place `where`. `name`: the row's own id."""
        if text.startswith(f"{where}: "):
            self.texts.append((with_id(f"{where}:", where, name).removesuffix(":"), text.removeprefix(f"{where}: ")))
        else:
            self.texts.append(("", text))

    @property
    def count(self) -> int:
        """Faults of single rows."""
        return len(self.texts) + sum(map(len, self._missing.values()))

    def lines(self, rows: int) -> list[str]:
        """A line per fault, and one for all rows with the same. `rows`: how many rows the source has."""
        places: dict[str, list[str]] = defaultdict(list)
        for place, text in self.texts:
            places[text].append(place)
        lines = [self._missing_line(columns, own, rows) for columns, own in self._missing.items()]
        lines += [line_of(text, own) for text, own in places.items()]
        return [f"{self.key}: {line}" for line in lines] if self.key else lines

    def _missing_line(self, columns: tuple[str, ...], rows: Sequence[Row], total: int) -> str:
        names = " or ".join(map(repr, columns))
        have = list(rows[0].columns)
        where = with_id(f"{rows[0].where}:", rows[0].where, rows[0].columns.get("id"))
        if len(rows) > 1:
            where = f"{rows[0].where}: here and in {len(rows) - 1:,} of {total - 1:,} other rows"
        line = f"{where} no column {names}"
        return f"{line} (columns: {', '.join(map(repr, have))[:300]}); {self._cure(columns, rows)}"

    def _cure(self, columns: Sequence[str], rows: Sequence[Row]) -> str:
        """Which columns may be meant: a `columns` map that is the wrong way round, or columns that are likely."""
        have = list(rows[0].columns)
        turned = {theirs: ours for ours, theirs in self.source.columns.items() if theirs in columns and ours in have}
        if turned:
            return f"`columns` is the wrong way round, write {self._mapping(turned)}"
        named = {ours: theirs for ours, theirs in self.source.columns.items() if ours in columns and self.in_recipe}
        unnamed = [column for column in columns if column not in named]
        cures = [_unfound(f"columns.{ours}", theirs, have) for ours, theirs in named.items()]
        if self.source.group in unnamed:
            unnamed.remove(self.source.group)
            cures.append(_unfound("group", self.source.group, have))
        return "; ".join([*cures, *([self._naming(unnamed, rows)] if unnamed else [])])

    def _naming(self, columns: Sequence[str], rows: Sequence[Row]) -> str:
        options: dict[str, Any] = self.source.task.options.model_dump()
        have = list(rows[0].columns)
        likely = self._likely(columns, rows)
        turns = likely.get("rejected")
        if turns and isinstance(rows[0].columns[turns], list):  # which only the format makes an answer of
            return f"call {turns!r} 'rejected' in the file"
        mapping = {column: likely.get(column, "...") for column in columns}
        cure = f"say which {'they are' if len(columns) > 1 else 'it is'} with {self._mapping(mapping)}"
        if self.source.task.kind == "extract" and options["answer"] in columns:
            if options["fields"] and {*options["fields"]} <= {*have}:
                return "if the columns called as the fields hold their values, write `answer: ''` in the task"
            cure += f", or name the column of the JSON object in the task: `answer: {likely.get(columns[0], 'COLUMN')}`"
        return cure

    def _likely(self, columns: Sequence[str], rows: Sequence[Row]) -> dict[str, str]:
        """{missing column: column that it may be}: one with files of such media, or with a name that is alike; for the
        last missing one the only column that is left.
        """
        used = {*self.source.columns, *self.source.columns.values(), self.source.group}
        values = {name: [row.columns.get(name) for row in rows[:ROWS_READ]] for name in rows[0].columns}
        used |= self._needed(rows[0])
        kinds = {name: kind_of_values(own) for name, own in values.items() if name not in used}
        likely: dict[str, str] = {}
        for column in columns:
            free = [name for name in kinds if name not in likely.values()]
            of_kind = [name for name in free if column in KINDS and kinds[name] == column]
            near = nearest(column, of_kind) or (of_kind[0] if of_kind else nearest(column, free))
            if not near and "rejected" in values and len(columns) == 1:  # beside which the answer may be called so
                near = nearest("chosen", free)
            if near:
                likely[column] = near
        missing = [column for column in columns if column not in likely]
        options = [value for value in self.source.task.options.model_dump().values() if isinstance(value, str)]
        left = [
            name
            for name, kind in kinds.items()
            if not kind and name != "id" and name not in likely.values() and not _uses(options, name)
        ]
        if len(missing) == len(left) == 1 and self.source.task.kind != "extract":  # of JSON, or of fields
            likely[missing[0]] = left[0]
        return likely

    def _needed(self, row: Row) -> set[str]:
        """Columns without which the row would be another sample, or none; none where it isn't one yet."""

        def sample_without(*names: str) -> Sample | None:
            left = {name: value for name, value in row.columns.items() if name not in names}
            with suppress(DataError):
                return sample_of(replace(row, columns=left), self.source.task)
            return None

        whole = sample_without()
        return {name for name in row.columns if sample_without(name) != whole} if whole else set()

    def _mapping(self, columns: dict[str, str]) -> str:
        if self.in_recipe:
            return "`columns: {" + ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items()) + "}`"
        flags = " ".join(f"--columns {ours}={theirs}" for ours, theirs in columns.items())
        return option(flags, f"columns={columns}")


def _uses(options: Sequence[str], name: str) -> bool:
    """Whether a task's option names the column, or its question has it in braces."""
    return any(value == name or f"{{{name}}}" in value for value in options)


def _unfound(key: str, theirs: str, have: Sequence[str]) -> str:
    near = nearest(theirs, have)
    there = f"the file has {near!r}: did you mean that?" if near else "the file has no such column"
    return f"{key} names {theirs!r}; {there}"


def line_of(text: str, places: Sequence[str]) -> str:
    """What is wrong in these places, as one line."""
    first, *others = places
    line = f"{first}: {text}" if first else text
    if not first:
        return f"{line} ({len(places):,} times)" if others else line
    if not others:
        return line
    file = first.partition(" (id ")[0].rpartition(":")[0]
    shown = ", ".join(place.removeprefix(f"{file}:") for place in others[: SHOWN - 1])
    more = f" and {len(others) - SHOWN + 1:,} more" if len(others) >= SHOWN else ""
    return f"{line}; so in {len(others):,} other row{'s' * (len(others) > 1)}: {shown}{more}"


def with_id(text: str, where: str, name: object) -> str:
    """The text of a fault with the row's own id behind its place, if it has one."""
    if isinstance(name, str | int) and name != "" and text.startswith(f"{where}:"):
        return f"{where} (id {name!r}){text.removeprefix(where)}"
    return text


def missing_columns(source: Source, row: Row, error: MissingColumn) -> tuple[str, ...]:
    """All columns that the task needs and the row lacks: the task stops at the first, which is filled in to find the
    next.
    """
    missing = [error.column]
    while True:
        # Its own file stands for a medium: only whether it is there is looked at.
        filled = {column: row.path if column in KINDS else "1" for column in missing}
        try:
            source.task.sample(replace(row, columns=row.columns | filled))
        except MissingColumn as further:
            if further.column not in missing:
                missing.append(further.column)
                continue
        except DataError:
            pass
        return tuple(missing)
