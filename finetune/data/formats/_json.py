"""What the formats in JSON share: rows one at a time, from JSON lines or from an array that is never held whole."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from finetune.common.errors import DataError

SUFFIXES = {".json", ".jsonl", ".ndjson"}
HEAD = 2**18  # bytes read to tell one format from another
LOOKED_AT = 20  # rows of them
COCO = {"info", "licenses", "type", "images", "annotations", "categories"}
CHUNK = 2**16  # characters read at once, at least
SLACK = 16  # as long as any word or number, or escape in a string, that may be cut off at the end of what is read
SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()
WRONG = (ValueError, RecursionError)  # what isn't JSON, what isn't UTF-8, what is nested too deep


class Scanner:
    """JSON read value by value: memory is that of one value. Raises one of WRONG. (ijson carries along the path of each
    value, so that a small file of deep brackets takes gigabytes.)
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.text = ""
        self.at = 0
        self.ended = False

    def peek(self) -> str:
        """The next character that isn't space, '' at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._read_on()

    def take(self, wanted: str) -> str:
        found = self.peek()
        if not found or found not in wanted:
            raise ValueError(f"{found!r} where {' or '.join(wanted)} is due" if found else "it ends too early")
        self.at += 1
        return found

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
        """Past a value, an array's one by one."""
        if self.peek() != "[":
            self.value()
        else:
            for _ in self.elements():
                pass

    def elements(self) -> Iterator[Any]:
        """Values of the array that begins here."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def members(self) -> Iterator[str]:
        """Keys of the object that begins here; whoever asks for the next has read the value of the last."""
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
        more = self.file.read(max(CHUNK, len(left)))  # a long value is tried again and again, each time doubled
        self.text, self.at, self.ended = left + more, 0, not more


def outline(path: Path) -> tuple[str, set[str]]:
    """What a JSON file is by its beginning, and the keys of its first rows: "conversations", of turns in ShareGPT's and
    LLaVA's form; "captions", one object in COCO's; or "rows", also where it is broken. "" of any other file.
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
        found = [json.loads(line) for line in lines[:LOOKED_AT]] if whole else []
    except WRONG:
        found = []
    keys = {key for row in found if isinstance(row, dict) for key in row} or _first_keys(text, whole)
    if "conversations" in keys:
        return "conversations", keys
    # A large file's annotations may begin far behind its images.
    captions = whole and "images" in keys <= COCO and ("annotations" in keys or not found)
    return "captions" if captions else "rows", keys


def _first_keys(text: str, whole: bool) -> set[str]:
    """Keys of the one object there is, or of the first of an array, as far as the text goes."""
    keys: set[str] = set()
    scanner = Scanner(io.StringIO(text))
    try:
        if whole:
            for key in scanner.members():
                keys.add(key)
                scanner.value()
        else:
            for row, _ in zip(scanner.elements(), range(LOOKED_AT), strict=False):
                keys |= row.keys() if isinstance(row, dict) else set()
    except WRONG:
        pass  # it ends where it ends; whoever reads the rows tells what is wrong with them
    return keys


def is_array(path: Path) -> bool:
    """Whether a JSON file is one array, rather than an object or a value per line."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        return Scanner(file).peek() == "["


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line of JSON lines, or number in the array, object). Raises DataError."""
    for number, found in array_of(path) if is_array(path) else _lines(path):
        if not isinstance(found, dict):
            raise DataError(f"{path.name}:{number}: a {type(found).__name__}, not an object")
        yield number, found


def array_of(path: Path, key: str | None = None) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of the array that a file is, or that stands under a key of the object that it is. Raises
    DataError.
    """
    number = 0
    with path.open(encoding="utf-8-sig") as file:
        scanner = Scanner(file)
        try:
            for found in scanner.members() if key else [None]:
                if found != key:
                    scanner.skip()
                    continue
                for number, value in enumerate(scanner.elements(), 1):
                    yield number, value
            if scanner.peek():
                raise ValueError("there is more behind its end")
        except WRONG as error:
            inside = f" in {key!r}" if key else ""
            raise DataError(f"{path.name}:{number + 1}: not JSON behind element {number}{inside} ({error})") from None


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            except WRONG as error:
                told = f"{path.name}:{number}: not JSON ({error}); write an object a line, or one array of them"
                raise DataError(told) from None
