"""What was found in rows, kept on disk (SQLite): memory doesn't grow with the rows, and rows are compared by joins."""

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What is found: whether training or evaluation would stop at it (an error), or it is worth a look; and its name.
CODES = {
    "unreadable": ("error", "lines or files that can't be read"),
    "empty": ("error", "empty rows"),
    "row": ("error", "rows that the task can't use"),
    "medium": ("error", "media that are missing or can't be decoded"),
    "tokens": ("error", "rows that can't be put into tokens"),
    "long": ("error", "rows longer than train.tokens_per_batch"),
    "context": ("error", "rows longer than the LLM reads"),
    "no_rows": ("error", "sources without a row that can be used"),
    "leak_row": ("error", "training rows that stand in evaluation too"),
    "leak_medium": ("warning", "training rows with a medium of evaluation"),
    "leak_near": ("warning", "training pictures much like one of evaluation"),
    "identical": ("warning", "rows that stand there more than once"),
    "contradiction": ("warning", "the same question and media, another label"),
    "duplicate": ("warning", "files with the same content as another"),
    "near": ("warning", "pictures much like another"),
    "imbalance": ("warning", "labels that are rare in training"),
    "unknown_label": ("warning", "labels that training never shows"),
    "encoding": ("warning", "text in the wrong encoding"),
    "blank": ("warning", "media with nothing to see"),
    "silent": ("warning", "recordings with nothing to hear"),
    "clipped": ("warning", "recordings that are clipped"),
    "short": ("warning", "recordings that are very short"),
}
ERRORS = tuple(code for code, (severity, _) in CODES.items() if severity == "error")

SCHEMA = """
create table rows (id integer primary key, source integer, number integer, split text, content blob, question blob,
                   tokens integer, answer text);
create table uses (row integer, digest blob, kind text, path text);
create table media (digest blob primary key, hash blob, thumbnail blob);
create table labels (row integer, asked text, split text, label text);
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


@dataclass
class Finding:
    """One thing that is wrong. `row`: its number in the ledger, None where it is the file's; `number`: its line, 0 for
    the file. `path`, `other`: media that it is about.
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
    """One row, as far as it could be read. `media`: (digest, kind, path, hash, thumbnail) of each; `asked`: what rows
    share whose labels are of one set.
    """

    row: int
    source: int
    number: int
    split: str = ""
    content: bytes = b""
    question: bytes = b""
    tokens: int = 0
    answer: str = ""
    asked: str = ""
    labels: tuple[str, ...] = ()
    media: list[tuple[bytes, str, str, bytes, bytes]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


class Ledger:
    def __init__(self, path: Path) -> None:
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
                read = (one.split, one.content, one.question, one.tokens, _whole(one.answer))
                kept = (one.row, one.source, one.number, *read)
                self.base.execute("insert into rows values (?, ?, ?, ?, ?, ?, ?, ?)", kept)
            uses = [(one.row, digest, kind, path) for digest, kind, path, _, _ in one.media]
            self.base.executemany("insert into uses values (?, ?, ?, ?)", uses)
            media = [(digest, seen, small) for digest, _, _, seen, small in one.media]
            self.base.executemany("insert or ignore into media values (?, ?, ?)", media)
            labels = [(one.row, one.asked, one.split, _whole(label)) for label in one.labels]
            self.base.executemany("insert into labels values (?, ?, ?, ?)", labels)
            self.add_findings(one.findings)

    def add_findings(self, findings: Iterable[Finding]) -> None:
        self.base.executemany(
            "insert into findings (code, text, row, source, number, path, other) values (?, ?, ?, ?, ?, ?, ?)",
            ((f.code, _whole(f.text), f.row, f.source, f.number, f.path, f.other) for f in findings),
        )

    def index(self) -> None:
        """To be called when all rows are in, before any comparison."""
        self.base.executescript(INDEXES)

    def query(self, sql: str, *values: object) -> Iterator[tuple[Any, ...]]:
        return self.base.execute(sql, values)

    def counts(self) -> dict[str, int]:
        """{code: findings}"""
        return dict(self.query("select code, count(*) from findings group by code order by code"))

    def findings(self, code: str | None = None, limit: int = -1) -> Iterator[Finding]:
        """By file and row."""
        where = "where code = ?" if code else "where ? is null"
        query = f"select code, text, row, source, number, path, other from findings {where}"
        for found in self.query(f"{query} order by source, number, id limit ?", code, limit):
            yield Finding(*found)


def _whole(text: str) -> str:
    """Text that UTF-8 can hold: halves of characters, as JSON may have them, are written out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
