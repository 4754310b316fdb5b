"""Rows of a file that isn't in order: what its format refuses is told line by line, and the other rows are read."""

import csv
import json
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import TextIO

from finetune.common.errors import DataError
from finetune.data.formats._json import array_of
from finetune.data.rows import Source, detected, read_rows
from finetune.data.sample import Row

TABLES = {".csv": ",", ".tsv": "\t"}
LINES = (".json", ".jsonl", ".ndjson")
SAMPLE_BYTES = 1 << 18  # of lines that aren't ASCII, to tell an encoding by
LONGEST = 1_000  # lines of one quoted field; beyond them its closing quote is taken to be missing
BLOCK = 64  # lines read at once behind the first that can't be

Wrong = Callable[[int, str, str], None]  # number of the line (0: the file), what is wrong, the line itself


def lenient_rows(source: Source, wrong: Wrong) -> Iterator[Row]:
    """The rows of a source. What can't be read goes to `wrong`, and reading goes on behind it: in CSV, TSV and JSON
    with the next row, in other formats not at all. Numbers of rows are those of the file.
    """
    last, suffix = 0, source.path.suffix.lower()
    try:
        for row in read_rows(source):
            last = row.number
            yield row
        return
    except DataError as error:
        if suffix not in (*TABLES, *LINES) or not source.path.is_file():
            wrong(0, str(error), "")
            return
    kind, options = source.format or detected(source.path)
    encoding = getattr(options, "encoding", None) or encoding_of(source.path)
    if encoding not in (getattr(options, "encoding", None), "utf-8-sig"):
        wrong(0, f"{source.path}: not UTF-8, read as {encoding}; save it as UTF-8", "")
    if hasattr(options, "encoding"):
        options = options.model_copy(update={"encoding": None})  # copies are UTF-8
    beside = source.media_folder or source.path.parent
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / source.path.name
        source = replace(source, media_folder=beside, format=(kind, options))
        if suffix in TABLES:
            delimiter = getattr(options, "delimiter", None) or TABLES[suffix]
            rows = _rest_of_table(source, copy, last, encoding, delimiter, wrong)
        else:
            rows = _rest_of_lines(source, copy, last, encoding, wrong)
        yield from rows


def encoding_of(path: Path) -> str:
    """UTF-8 where the file is that, UTF-16 by its mark; else what the lines that aren't ASCII look like."""
    from charset_normalizer import from_bytes

    strange, whole = bytearray(), True
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return "utf-16"
        file.seek(0)
        for line in file:
            if line.isascii():
                continue
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                whole = False
                strange += line
                if len(strange) > SAMPLE_BYTES:
                    break
    if whole:
        return "utf-8-sig"
    guess = from_bytes(bytes(strange)).best()
    # Asked first: a few lines of either are too little for statistics over all encodings there are.
    for encoding in ("gb18030",) if _is_chinese(strange) else (*_western(strange), guess.encoding if guess else ""):
        try:
            bytes(strange).decode(encoding)
            return encoding
        except (UnicodeDecodeError, LookupError):
            continue
    return "utf-8-sig"  # of some lines; others are damaged


def _is_chinese(content: bytes | bytearray) -> bool:
    """Whether most characters above ASCII are, read as GB 18030, frequent Chinese ones (GB 2312, level 1) or signs."""
    frequent = others = position = 0
    while position < len(content):
        lead, trail = content[position], content[position + 1] if position + 1 < len(content) else 0
        if lead < 0x80:
            position += 1
            continue
        known = (0xB0 <= lead <= 0xD7 or 0xA1 <= lead <= 0xA3) and trail >= 0xA1
        frequent, others = frequent + known, others + (not known)
        position += 2
    return frequent > 4 * others


def _western(content: bytes | bytearray) -> tuple[str, ...]:
    """Letters above ASCII stand alone in Western text, between others."""
    high = [byte > 127 for byte in content]
    return ("cp1252",) if sum(a and b for a, b in pairwise(high)) < 0.2 * sum(high) else ()


def _rest_of_lines(source: Source, copy: Path, last: int, encoding: str, wrong: Wrong) -> Iterator[Row]:
    """Rows of JSON lines, or of an array, behind row `last`."""
    with source.path.open(encoding=encoding, errors="replace") as file:
        lines = islice(_elements(file, source.path, wrong), last, None)
        number = last
        while block := list(islice(lines, BLOCK)):
            while block:
                copy.write_text("".join(f"{line}\n" for line in block), encoding="utf-8")
                done = len(block)
                try:
                    for row in read_rows(replace(source, path=copy)):
                        yield replace(row, path=source.path, number=row.number + number)
                except DataError as error:
                    place = re.search(rf"{re.escape(copy.name)}:([0-9]+)", str(error))
                    if not place:
                        wrong(0, str(error).replace(str(copy), str(source.path)), "")
                        return
                    done = int(place[1])
                    here = f"{copy.name}:{number + done}"
                    wrong(number + done, str(error).replace(place[0], here), block[done - 1])
                block = block[done:]
                number += done


def is_array(path: Path) -> bool:
    """Whether a JSON file is one array."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _elements(file: TextIO, path: Path, wrong: Wrong) -> Iterator[str]:
    """The lines of a file, or of one JSON array each element as a line."""
    if not is_array(path):
        yield from (line.rstrip("\r\n") for line in file)
        return
    try:
        for _, element in array_of(path):
            yield json.dumps(element, ensure_ascii=False)
    except DataError as error:
        wrong(0, f"{error}; what follows can't be read", "")


def _rest_of_table(source: Source, copy: Path, last: int, encoding: str, delimiter: str, wrong: Wrong) -> Iterator[Row]:
    """Rows of a table behind line `last`. Lines that aren't rows are left empty, so that others keep their numbers."""
    # An undecodable byte becomes U+FFFD, which is found in the row.
    with (
        source.path.open(encoding=encoding, errors="replace", newline="") as lines,
        copy.open("w", encoding="utf-8", newline="") as file,
    ):
        _sieve(lines, file, wrong, source.path.name, delimiter)
    try:
        for row in read_rows(replace(source, path=copy)):
            if row.number > last:
                yield replace(row, path=source.path)
    except DataError as error:
        wrong(0, str(error).replace(str(copy), str(source.path)), "")


def _sieve(lines: TextIO, file: TextIO, wrong: Wrong, name: str, delimiter: str) -> None:
    again: deque[str] = deque()
    taken: list[str] = []

    def feed() -> Iterator[str]:
        while line := (again.popleft() if again else next(lines, "")):
            taken.append(line)
            if len(taken) > LONGEST:
                raise csv.Error(f"a quote isn't closed within {LONGEST:,} lines")
            yield line

    width, number = 0, 0
    while True:
        taken.clear()
        fields, reason = None, ""
        try:
            fields = next(csv.reader(feed(), delimiter=delimiter, strict=True), None)
        except csv.Error as error:
            reason = str(error)
        if not taken:
            return
        width = width or len(fields or ())
        if fields and len(fields) > width:
            reason = f"{len(fields)} fields, more than the header's {width}"
        kept = len(taken)
        if reason:
            kept = kept if fields else 1  # a broken quote may have swallowed rows that are fine
            wrong(number + 1, f"{name}:{number + 1}: {reason}", "".join(taken[:kept]).rstrip("\r\n"))
            again.extendleft(reversed(taken[kept:]))
        file.writelines("\n" * kept if reason else taken)
        number += kept
