"""Shared by the formats in JSON: rows one at a time, from JSON lines or from an array that is never in memory whole."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from finetune.common.errors import DataError
from finetune.data.formats import NumberedRows

SUFFIXES = {".json", ".jsonl", ".ndjson"}
HEAD = 2**18  # bytes read to tell one format from another
HEAD_ROWS = 20  # rows read to tell one format from another
COCO = {"info", "licenses", "type", "images", "annotations", "categories"}
CHUNK = 2**16  # characters read at once, at least
SLACK = 16  # the longest word, number or escape that may be cut off at the end of a chunk
SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()
INVALID = (ValueError, RecursionError)  # not JSON, not UTF-8, nested too deep


class Scanner:
    """Reads JSON value by value, in the memory of one value. Raises one of INVALID. (ijson keeps the path of each
    value, so that a small file of deep brackets takes gigabytes.)
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.text = ""
        self.at = 0
        self.ended = False

    def peek(self) -> str:
        """The next character that isn't white space, '' at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._read_on()

    def take(self, wanted: str) -> str:
        character = self.peek()
        if not character or character not in wanted:
            raise ValueError(f"{character!r} instead of {' or '.join(wanted)}" if character else "it ends too early")
        self.at += 1
        return character

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if self.ended or end < len(self.text) - SLACK:
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - SLACK
                if self.ended or not cut:
                    raise ValueError(error.msg) from None
            self._read_on()

    def skip(self) -> None:
        """Skip a value; an array's elements one by one."""
        if self.peek() != "[":
            self.value()
        else:
            for _ in self.elements():
                pass

    def elements(self) -> Iterator[Any]:
        """The values of the array that begins here."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here. Each value has to be read before the next key."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            key = self.value()
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return

    def _read_on(self) -> None:
        left = self.text[self.at :]
        more = self.file.read(max(CHUNK, len(left)))  # a long value is tried repeatedly, with twice as much each time
        self.text, self.at, self.ended = left + more, 0, not more


def outline(path: Path) -> tuple[str, set[str]]:
    """The kind of a JSON file, by its beginning, and the keys of its first rows. "conversations": turns in the form of
    ShareGPT and LLaVA; "captions": one object in the form of COCO; "rows": any other, broken ones too; "": not JSON.
    """
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return "", set()
    with path.open("rb") as file:
        head = file.read(HEAD)
    text = head.decode("utf-8-sig", "ignore")
    lines = [line for line in text.splitlines() if line.strip()]
    if len(head) == HEAD:
        lines = lines[:-1]  # cut off
    whole = not text.lstrip().startswith("[")
    try:
        rows = [json.loads(line) for line in lines[:HEAD_ROWS]] if whole else []
    except INVALID:
        rows = []
    keys = {key for row in rows if isinstance(row, dict) for key in row} or _first_keys(text, whole)
    if "conversations" in keys:
        return "conversations", keys
    # A large file's annotations may begin far behind its images.
    captions = whole and "images" in keys <= COCO and ("annotations" in keys or not rows)
    return "captions" if captions else "rows", keys


def _first_keys(text: str, whole: bool) -> set[str]:
    """Keys of a file's one object, or of the first objects of its array, as far as the text goes."""
    keys: set[str] = set()
    scanner = Scanner(io.StringIO(text))
    try:
        if whole:
            for key in scanner.members():
                keys.add(key)
                scanner.value()
        else:
            for row, _ in zip(scanner.elements(), range(HEAD_ROWS), strict=False):
                keys |= row.keys() if isinstance(row, dict) else set()
    except INVALID:
        pass  # cut off, or broken: reading the rows reports it
    return keys


def is_array(path: Path) -> bool:
    """Whether a JSON file is one array, rather than an object or a value per line."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        return Scanner(file).peek() == "["


def objects(path: Path) -> NumberedRows:
    """(line of JSON lines, or number in the array, object). Raises DataError."""
    for number, value in array_of(path) if is_array(path) else _lines(path):
        if not isinstance(value, dict):
            raise DataError(f"{path.name}:{number}: a {type(value).__name__}, not an object")
        yield number, value


def array_of(path: Path, key: str | None = None) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of a file that is an array, or of the array under a key of its one object. Raises
    DataError.
    """
    number = 0
    with path.open(encoding="utf-8-sig") as file:
        scanner = Scanner(file)
        try:
            for member in scanner.members() if key else [None]:
                if member != key:
                    scanner.skip()
                    continue
                for number, value in enumerate(scanner.elements(), 1):
                    yield number, value
            if scanner.peek():
                raise ValueError("more text behind its end")
        except INVALID as error:
            inside = f" in {key!r}" if key else ""
            raise DataError(f"{path.name}:{number + 1}: not JSON after element {number}{inside} ({error})") from None


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            except INVALID as error:
                raise DataError(
                    f"{path.name}:{number}: not JSON ({error}); write an object per line, or one array of them"
                ) from None
