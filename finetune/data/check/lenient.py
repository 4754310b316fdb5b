"""Rows of a damaged file: what its format refuses is reported line by line, and the other rows are read."""

import csv
import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from finetune.common.errors import DataError
from finetune.data.formats._json import SUFFIXES, array_of, is_array
from finetune.data.formats.table import Options, check_header, refuse_title, refuse_workbook
from finetune.data.read import detected, read_rows
from finetune.data.sample import Row
from finetune.recipe.schema import RowFile

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SAMPLE_BYTES = 1 << 18  # of lines that aren't UTF-8, to detect their encoding by
COHERENT = 0.2  # of 1: share of letters that are frequent in a language, from which a detected encoding is believed
COMMON_HAN = {  # encoding -> a codec, and the first bytes by which it sorts the commonest thousands of characters
    **dict.fromkeys(("gb18030", "gbk", "gb2312"), ("gb2312", range(0xB0, 0xD8))),
    "big5": ("big5", range(0xA4, 0xC7)),
}
FEWEST_HAN = 20  # characters below which a match may be chance
MOSTLY = 0.9  # share of the letters beyond ASCII that are common Chinese characters
MESSIER = 0.1  # by which charset-normalizer's next candidate is at least worse
LONGEST = 1_000  # lines of one quoted field; beyond them its closing quote is taken to be missing

Report = Callable[[int, str, str], None]  # number of the line (0: the file), what is wrong with it, the line itself


def lenient_rows(source: RowFile, report: Report, max_bytes: int) -> Iterator[Row]:
    """The rows of a source, under the line numbers of its file. What can't be read goes to `report`; reading then goes
    on with the next row of CSV, TSV and JSON, and ends with other formats.
    """
    last, suffix = 0, source.path.suffix.lower()
    try:
        for row in read_rows(source, max_bytes):
            last = row.number
            yield row
        return
    except DataError as error:
        if suffix not in (*DELIMITERS, *SUFFIXES) or not source.path.is_file():
            report(0, str(error), "")
            return
    part = source.format or detected(source.path)
    options, encoding = part.options, getattr(part.options, "encoding", None)
    if encoding is None:
        try:
            encoding = encoding_of(source.path)
        except DataError as error:
            report(0, str(error), "")
            return
        if encoding != "utf-8-sig":
            named = f", or write `format: {{kind: table, encoding: {encoding}}}`" if part.kind == "table" else ""
            report(0, f"{source.path}: not UTF-8, read as {encoding}; save it as UTF-8{named}", "")
    if hasattr(options, "encoding"):
        options = options.model_copy(update={"encoding": None})  # the copy is UTF-8
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / source.path.name
        readable = {"media_folder": source.folder_of_media, "format": replace(part, options=options)}
        source = source.model_copy(update=readable)
        if suffix in DELIMITERS:
            if isinstance(options, Options) and (wrong := _wrong_header(source.path, encoding, options)):
                report(0, wrong, "")
                return
            delimiter = getattr(options, "delimiter", None) or DELIMITERS[suffix]
            yield from _rest_of_table(source, copy, last, encoding, delimiter, report, max_bytes)
        else:
            yield from _rest_of_lines(source, copy, last, encoding, report, max_bytes)


def encoding_of(path: Path) -> str:
    """UTF-16 by its mark; UTF-8 where at least half of the lines beyond ASCII are; else what charset-normalizer detects
    clearly: text of a language, and of no other encoding as well, or common Chinese characters, whose short texts show
    no language. Raises DataError where nothing is clear.
    """
    from charset_normalizer import from_bytes

    refuse_workbook(path)
    foreign, foreign_lines, utf8_lines = bytearray(), 0, 0
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return "utf-16"
        file.seek(0)
        for line in file:
            try:
                utf8_lines += bool(line.decode("utf-8")) and not line.isascii()
            except UnicodeDecodeError:
                foreign_lines += 1
                foreign += line
                if len(foreign) > SAMPLE_BYTES:
                    break
    if foreign_lines <= utf8_lines:
        return "utf-8-sig"
    content = bytes(foreign)
    best, *others = from_bytes(content) or (None,)
    letters = _letters(content)
    if chinese := _chinese(content, [best, *others]) or _chinese(letters, [*from_bytes(letters)] or [None]):
        return chinese
    if best and best.coherence >= COHERENT:
        rivals = [other for other in others if other.chaos <= best.chaos and other.coherence >= best.coherence]
        if not rivals:
            return best.encoding
    raise DataError(
        f"{path}: not UTF-8, and its encoding isn't clear; save it as UTF-8, or name the encoding of a table: "
        "`format: {kind: table, encoding: gb18030}`"
    )


def _letters(content: bytes) -> bytes:
    """Chinese without marks such as ～ and emoji, of which charset-normalizer takes more than a few for mess."""
    try:
        return "".join(c if c.isalpha() else "\n" for c in content.decode("gb18030")).encode("gb18030")
    except UnicodeDecodeError:
        return b""


def _chinese(content: bytes, matches: Sequence[Any]) -> str:
    """The first of the matches where it's alone and reads common characters, else ''."""
    best, *others = matches
    alone = best and all(other.chaos >= best.chaos + MESSIER for other in others)
    return str(best.encoding) if alone and _is_common_chinese(content, best.encoding) else ""


def _is_common_chinese(content: bytes, encoding: str) -> bool:
    codec, common = COMMON_HAN.get(encoding, ("", range(0)))
    try:
        letters = [c for c in content.decode(encoding) if c.isalpha() and not c.isascii()] if codec else []
    except UnicodeDecodeError:
        return False
    # What the codec lacks becomes '?', which is in neither range.
    count = sum(letter.encode(codec, errors="replace")[0] in common for letter in letters)
    return count >= max(FEWEST_HAN, MOSTLY * len(letters))


def _rest_of_lines(
    source: RowFile, copy: Path, last: int, encoding: str, report: Report, max_bytes: int
) -> Iterator[Row]:
    """Rows of JSON lines, or of an array, behind row `last`."""
    of_copy = source.model_copy(update={"path": copy})
    with source.path.open(encoding=encoding, errors="replace") as file:
        for number, line in islice(enumerate(_elements(file, source.path, report), 1), last, None):
            copy.write_text(f"{line}\n", encoding="utf-8", errors="surrogatepass")  # as `json` reads it
            try:
                for row in read_rows(of_copy, max_bytes):
                    yield replace(row, path=source.path, number=number)
            except DataError as error:
                text = str(error).replace(str(copy), str(source.path))
                report(number, text.replace(f"{copy.name}:1", f"{copy.name}:{number}"), line)


def _elements(file: TextIO, path: Path, report: Report) -> Iterator[str]:
    """The lines of a file, or of one JSON array each element as a line."""
    if not is_array(path):
        yield from (line.rstrip("\r\n") for line in file)
        return
    try:
        for _, element in array_of(path):
            yield json.dumps(element, ensure_ascii=False)
    except DataError as error:
        report(0, f"{error}; what follows can't be read", "")


def _wrong_header(path: Path, encoding: str, options: Options) -> str:
    """Why no row of a table can be read, '' if rows can."""
    with path.open(encoding=encoding, errors="replace", newline="") as lines:
        try:
            delimiter = options.delimiter or DELIMITERS[path.suffix.lower()]
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            check_header(path, header := next(reader, []), options)
            refuse_title(path, header, dict(zip(header, next(reader, []), strict=False)))
        except csv.Error:
            return ""  # reported with its line
        except DataError as error:
            return str(error)
    return ""


def _rest_of_table(
    source: RowFile, copy: Path, last: int, encoding: str, delimiter: str, report: Report, max_bytes: int
) -> Iterator[Row]:
    """Rows of a table behind line `last`. Lines that aren't rows are left empty, so that others keep their numbers."""
    # An undecodable byte becomes U+FFFD, a finding of the row.
    with (
        source.path.open(encoding=encoding, errors="replace", newline="") as lines,
        copy.open("w", encoding="utf-8", newline="") as file,
    ):
        _sieve(lines, file, report, source.path.name, delimiter)
    try:
        for row in read_rows(source.model_copy(update={"path": copy}), max_bytes):
            if row.number > last:
                yield replace(row, path=source.path)
    except DataError as error:
        report(0, str(error).replace(str(copy), str(source.path)), "")


def _sieve(source: TextIO, copy: TextIO, report: Report, name: str, delimiter: str) -> None:
    """Copy the lines of a table that are rows; leave the others empty."""
    unread: deque[str] = deque()  # lines to be read again, behind a row that was broken off
    lines: list[str] = []  # of the row that is being read

    def feed() -> Iterator[str]:
        while line := (unread.popleft() if unread else next(source, "")):
            lines.append(line)
            if len(lines) > LONGEST:
                raise csv.Error(f"a quote isn't closed within {LONGEST:,} lines")
            yield line

    width, number = 0, 0
    while True:
        lines.clear()
        fields, reason = None, ""
        try:
            fields = next(csv.reader(feed(), delimiter=delimiter, strict=True), None)
        except csv.Error as error:
            reason = str(error)
        if not lines:
            return
        width = width or len(fields or ())
        if fields and len(fields) > width:
            reason = f"{len(fields)} fields, more than the header's {width}"
        if reason:
            done = len(lines) if fields else 1  # an open quote may have swallowed sound rows
            report(number + 1, f"{name}:{number + 1}: {reason}", "".join(lines[:done]).rstrip("\r\n"))
            unread.extendleft(reversed(lines[done:]))
            copy.writelines("\n" * done)
        else:
            done = len(lines)
            copy.writelines(lines)
        number += done
