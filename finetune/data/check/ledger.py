"""Findings about rows in SQLite on disk: memory doesn't grow with the rows, and rows are compared by joins."""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from finetune.data.check.inspect import View

# Code of a finding -> its severity (an error stops training or evaluation) and its title.
CODES = {
    "unreadable": ("error", "lines or files that can't be read"),
    "empty": ("error", "empty rows"),
    "row": ("error", "rows that the task refuses"),
    "medium": ("error", "media that are missing or can't be decoded"),
    "tokens": ("error", "rows that can't be tokenized"),
    "long": ("error", "rows longer than train.tokens_per_batch"),
    "context": ("error", "rows longer than the LLM's context"),
    "no_rows": ("error", "sources without a usable row"),
    "leak_row": ("error", "training rows that are in evaluation too"),
    "leak_medium": ("warning", "training rows with a medium that is in evaluation too"),
    "leak_near": ("warning", "pairs of a training picture and a near-duplicate in evaluation"),
    "identical": ("warning", "duplicate rows"),
    "contradiction": ("warning", "the same question and media with another label"),
    "duplicate": ("warning", "files with the same content as another"),
    "near": ("warning", "pairs of near-duplicate pictures"),
    "imbalance": ("warning", "labels that are rare in training"),
    "spelling": ("warning", "labels that differ in their spelling only"),
    "unknown_label": ("warning", "labels that no training row has"),
    "encoding": ("warning", "text in the wrong encoding"),
    "blank": ("warning", "pictures and videos of one colour"),
    "silent": ("warning", "silent recordings"),
    "clipped": ("warning", "clipped recordings"),
    "short": ("warning", "very short recordings"),
}
ERRORS = tuple(code for code, (severity, _) in CODES.items() if severity == "error")

SCHEMA = """
create table rows (id integer primary key, source integer, number integer, split text, content blob, question blob,
                   tokens integer, answer text, ranked integer);
create table uses (row integer, digest blob, kind text, path text);
create table media (digest blob primary key, hash blob, thumbnail blob);
create table labels (row integer, label_set text, split text, label text);
create table findings (id integer primary key, code text, row integer, source integer, number integer, text text,
                       path text, other text);
"""
INDEXES = """
create index rows_content on rows (content);
create index rows_question on rows (question);
create index uses_digest on uses (digest, path);
create index uses_row on uses (row);
create index findings_row on findings (row);
create index findings_code on findings (code);
"""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `row`: its number in the ledger, None if it is about a file or source; `number`: its
    line, 0 for the file. `path`, `other`: media that it is about.
    """

    code: str
    text: str
    row: int | None = None
    source: int = 0
    number: int = 0
    path: str = ""
    other: str = ""


@dataclass
class Examined:
    """One row, as far as it could be read. `label_set`: equal for rows whose labels are of one set. `ranked`: whether
    it is an item of a ranking, whose media groups share.
    """

    row: int
    source: int
    number: int
    split: str = ""
    content: bytes = b""
    question: bytes = b""
    tokens: int = 0
    answer: str = ""
    label_set: str = ""
    labels: tuple[str, ...] = ()
    media: list[View] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    ranked: bool = False


class SplitCounts(TypedDict):
    rows: int
    tokens: int
    longest: int


class Summary(TypedDict):
    """What check.json begins with. `findings`: {code: how many}; `examples`: {code: the first of them}."""

    name: str
    rows: int
    errors: int
    warnings: int
    splits: dict[str, SplitCounts]
    different_media: dict[str, int]
    near: dict[str, float]
    findings: dict[str, int]
    examples: dict[str, str]


class Ledger:
    """`names`: of the sources, as findings show them; `files`: {source: names of its rows}, where each is a file."""

    def __init__(self, path: Path, names: Sequence[str], files: Mapping[int, Sequence[str]] = {}) -> None:
        self.names, self.files = names, files
        self.base = sqlite3.connect(path)
        self.base.execute("pragma journal_mode = off")
        self.base.execute("pragma synchronous = off")
        self.base.execute("pragma cache_size = -16384")  # 16 MiB
        self.base.execute("pragma temp_store = file")
        self.base.executescript(SCHEMA)

    def close(self) -> None:
        self.base.close()

    def add(self, rows: Iterable[Examined]) -> None:
        for one in rows:
            if one.split:
                place = one.row, one.source, one.number, one.split
                values = (*place, one.content, one.question, one.tokens, _encodable(one.answer), one.ranked)
                self.base.execute("insert into rows values (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
            uses = [(one.row, use.digest, use.kind, use.path) for use in one.media]
            self.base.executemany("insert into uses values (?, ?, ?, ?)", uses)
            media = [(use.digest, use.hash, use.thumbnail) for use in one.media]
            self.base.executemany("insert or ignore into media values (?, ?, ?)", media)
            labels = [(one.row, one.label_set, one.split, _encodable(label)) for label in one.labels]
            self.base.executemany("insert into labels values (?, ?, ?, ?)", labels)
            self.add_findings(one.findings)

    def add_findings(self, findings: Iterable[Finding]) -> None:
        self.base.executemany(
            "insert into findings (code, text, row, source, number, path, other) values (?, ?, ?, ?, ?, ?, ?)",
            ((f.code, _encodable(f.text), f.row, f.source, f.number, f.path, f.other) for f in findings),
        )

    def index(self) -> None:
        """To be called once, after all rows were added and before they are compared."""
        self.base.executescript(INDEXES)

    def query(self, sql: str, *values: object) -> Iterator[tuple[Any, ...]]:
        return self.base.execute(sql, values)

    def counts(self) -> dict[str, int]:
        """{code: how many findings}"""
        return dict(self.query("select code, count(*) from findings group by code order by code"))

    def findings(self, code: str | None = None, limit: int = -1) -> Iterator[Finding]:
        """In the order of files and lines."""
        where = "where code = ?" if code else "where ? is null"
        sql = f"select code, text, row, source, number, path, other from findings {where}"
        for values in self.query(f"{sql} order by source, number, id limit ?", code, limit):
            yield Finding(*values)

    def where(self, source: int, number: int) -> str:
        """ "rows.csv:12", or for line 0 the file alone; "pictures/cats/1.jpg" for the row of a folder."""
        if number and (files := self.files.get(source)):
            return files[number - 1]
        return f"{self.names[source]}:{number}" if number else self.names[source]


def _encodable(text: str) -> str:
    """Text that UTF-8 can encode: lone surrogates, which JSON may hold, are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
