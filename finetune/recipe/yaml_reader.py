"""YAML as people mean it, with the line of every key, and words for what is wrong with a value.

Read from PyYAML's events, so that no object is ever built by a tag and no alias expanded. Plain scalars follow YAML 1.2
(`2e-4` is a number; `no`, `on`, `0o17`, `1:30` and `2024-01-01` stay text), keys are always text.
"""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from finetune.common.errors import RecipeError
from finetune.recipe.words import MAX_DEPTH, Location, Problem, dotted, nearest, shorten

MAX_BYTES = 2**20
MAX_DIGITS = 18
MAX_PROBLEMS = 10
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
NULLS = ("", "~", "null", "Null", "NULL")
BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class Place(NamedTuple):
    line: int
    text: str  # "recipes/x.yaml:14" or "--set train.seed"


@dataclass
class Document:
    value: Any
    places: dict[Location, Place] = field(default_factory=dict)

    def place(self, location: Location) -> Place:
        """Where a key stands; for a key that isn't written, where the nearest one above it does."""
        while location not in self.places:
            location = location[:-1]
        return self.places[location]


def read_yaml(text: str, name: str, numbered: bool = True) -> Document:
    """Read one document. Raises RecipeError with `name` (and the line, if `numbered`) for all that isn't plain YAML."""
    builder = _Builder(text, name, numbered)
    try:
        return builder.document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        if "'\\t'" in reason:
            reason = "a tab can't indent: use spaces"
        advice = " Inside { } or [ ], put text with ? : , or # in quotes." if "flow" in reason else ""
        raise builder.refusal(mark.line if mark else 0, f"not YAML: {shorten(reason, 200)}.{advice}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        raise builder.refusal(line, f"a control character, {text[error.position]!r}: remove it.") from None
    except (ValueError, OverflowError):  # PyYAML lets these through for escapes like "\UFFFFFFFF"
        raise builder.refusal(builder.line, "not YAML: an escape or directive that can't be read.") from None


def read_text(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file.{near_file(str(path))}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: a folder; name the recipe's file in it.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"{shorten(path, 200)}: can't be read: {reason}.") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than 1 MiB; is it a recipe?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: not UTF-8; save the file as UTF-8.") from None


def near_file(path: str) -> str:
    folder, name = os.path.split(path)
    try:
        near = nearest(name, set(os.listdir(folder or ".")) - {name})
    except (OSError, ValueError):
        return ""
    return f" Did you mean {shorten(near)!r}?" if near else ""


class _Builder:
    def __init__(self, text: str, name: str, numbered: bool):
        self.events = yaml.parse(text, Loader=yaml.SafeLoader)
        self.name = name
        self.numbered = numbered
        self.places: dict[Location, Place] = {}
        self.line = 0

    def document(self) -> Document:
        self.places[()] = self.place(0)
        self.next()  # the stream's start
        if isinstance(self.next(), yaml.StreamEndEvent):
            return Document(None, self.places)
        value = self.value(self.next(), ())
        self.next()  # the document's end
        if isinstance(self.next(), yaml.DocumentStartEvent):
            raise self.refusal(self.line, "a second document: a recipe is one document.")
        return Document(value, self.places)

    def next(self) -> Any:
        event: Any = next(self.events)
        self.line = event.start_mark.line
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise self.refusal(self.line, "anchors and aliases (& and *) aren't used here: write the value out.")
        if getattr(event, "tag", None) is not None:
            raise self.refusal(self.line, f"tags ({shorten(event.tag, 40)}) aren't used here: remove it.")
        return event

    def value(self, event: yaml.Event, location: Location) -> Any:
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        if len(location) >= MAX_DEPTH:
            raise self.refusal(self.line, f"nested deeper than {MAX_DEPTH} levels.")
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(item := self.next(), yaml.SequenceEndEvent):
                below = (*location, len(items))
                self.places[below] = self.place(self.line)
                items.append(self.value(item, below))
            return items
        mapping: dict[str, Any] = {}
        while not isinstance(key := self.next(), yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent):
                raise self.refusal(self.line, "a list or mapping used as a key: a key is text.")
            below = (*location, self.text(key))
            if key.value in mapping:
                first = self.places[below].line
                raise self.refusal(self.line, f"{dotted(below)}: written twice, first in line {first}.")
            self.places[below] = self.place(self.line)
            mapping[key.value] = self.value(self.next(), below)
        return mapping

    def text(self, event: yaml.ScalarEvent) -> str:
        text: str = event.value
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise self.refusal(self.line, "text with a NUL or half a surrogate pair.")
        return text

    def scalar(self, event: yaml.ScalarEvent) -> Any:
        text = self.text(event)
        if not event.implicit[0]:  # quoted, or a block
            return text
        if text in NULLS:
            return None
        if text in BOOLEANS:
            return BOOLEANS[text]
        if INTEGER.fullmatch(text):
            if len(text) > MAX_DIGITS:
                raise self.refusal(self.line, f"a number of more than {MAX_DIGITS} digits; quote it if it is text.")
            return int(text)
        if FLOAT.fullmatch(text):
            number = float(text)
            if math.isinf(number):
                raise self.refusal(self.line, f"{shorten(text, 40)} is too large for a number; quote it if it is text.")
            return number
        return text

    def place(self, line: int) -> Place:
        return Place(line + 1, f"{self.name}:{line + 1}") if self.numbered else Place(0, self.name)

    def refusal(self, line: int, reason: str) -> RecipeError:
        return RecipeError(f"{self.place(line).text}: {reason}")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


# On top of YAML 1.1's own: text that either reading would take for something else is quoted.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"(?:{FLOAT.pattern})$"), list("-+.0123456789"))


# PyYAML folds these line breaks away unless they are escaped.
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if re.search("[\x85\u2028\u2029\r]", text) else None
    ),
)


def dump_yaml(value: Any) -> str:
    """Write what `read_yaml` reads back equal."""
    written: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return written


# What a value should be, read from the JSON schema.


# Words


def refusal(document: Document, problems: Iterable[Problem]) -> RecipeError:
    """One line a problem, in the order of the file."""
    lines = []
    for location, message in sorted(problems, key=lambda problem: document.place(problem[0]).line):
        place = document.place(location).text
        key = dotted(location)
        lines.append(f"{place}: {message}" if place == f"--set {key}" or not key else f"{place}: {key}: {message}")
    hidden = len(lines) - MAX_PROBLEMS
    return RecipeError("\n".join(lines[:MAX_PROBLEMS] + ([f"... and {hidden} more."] if hidden > 0 else [])))
