"""YAML as people mean it, with the line of every key, and words for what is wrong with a value.

Read from PyYAML's events, so that no object is ever built by a tag and no alias expanded. Plain scalars follow YAML 1.2
(`2e-4` is a number; `no`, `on`, `0o17`, `1:30` and `2024-01-01` stay text), keys are always text.
"""

import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError, core_schema

from finetune.errors import RecipeError

Location = tuple[str | int, ...]
Problem = tuple[Location, str]

MAX_BYTES = 2**20
MAX_DEPTH = 20
MAX_DIGITS = 18
MAX_PROBLEMS = 10
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
NULLS = ("", "~", "null", "Null", "NULL")
BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
BOOLEAN_WORDS = {"yes": "true", "on": "true", "y": "true", "true": "true"} | dict.fromkeys(
    ("no", "off", "n", "false"), "false"
)
BUILT_IN_ERRORS = frozenset(get_args(core_schema.ErrorType)) - {"value_error", "assertion_error"} | {"path_type"}


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


def override(document: Document, assignment: str, schema: dict[str, Any]) -> None:
    """Apply one `--set full.dotted.key=value` to a document; keys that don't exist are found when it is validated."""
    key, equals, written = assignment.partition("=")
    name = f"--set {shorten(key, 80)}"
    if not equals:
        raise RecipeError(f"{name}: no '='; write --set {nearest_key(key, document, schema) or shorten(key)}=VALUE.")
    place = Place(0, name)
    value = read_yaml(written, name, numbered=False).value
    location: Location = ()
    parent = document.value
    steps = key.split(".")
    if len(steps) > MAX_DEPTH:
        raise RecipeError(f"{name}: no key is nested deeper than {MAX_DEPTH} levels.")
    for remaining, step in zip(reversed(range(len(steps))), steps, strict=True):
        index: Any = step
        if isinstance(parent, list):
            if step not in [str(number) for number in range(len(parent))]:
                count = f"{len(parent)} {'entry' if len(parent) == 1 else 'entries'}, counted from 0"
                raise RecipeError(f"{name}: {dotted(location)} has {count}; there is no {shorten(step)!r}.")
            index = int(step)
        location = (*location, index)
        if not remaining:
            parent[index] = value
            break
        inner = below(parent, index)
        if inner is None or isinstance(inner, str):  # a part written short: `task: caption` is `task: {kind: caption}`
            parent[index] = {} if inner is None else {"kind": inner}
            document.places[location] = place
        elif not isinstance(inner, dict | list):
            raise RecipeError(f"{name}: {dotted(location)} is {seen(inner)}, with no keys in it.")
        parent = parent[index]
    for old in [old for old in document.places if old[: len(location)] == location]:
        del document.places[old]
    document.places[location] = place


# What a value should be, read from the JSON schema.


def alternatives(node: dict[str, Any], schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schemas of which a value must match one, references followed."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    choices = node.get("anyOf") or node.get("oneOf")
    if not choices:
        yield node
    for choice in choices or ():
        yield from alternatives(choice, schema)


def members(node: dict[str, Any], value: Any, schema: dict[str, Any]) -> dict[str | int, dict[str, Any]]:
    """The keys or indices that `value` has or may have, with their schemas; of a part, those of its kind."""
    found: dict[str | int, dict[str, Any]] = {}
    kind = value.get("kind") if isinstance(value, dict) else value
    for choice in alternatives(node, schema):
        properties = choice.get("properties", {})
        if properties.get("kind", {}).get("const", kind) != kind:
            continue
        found |= properties
        for others in (choice.get("additionalProperties"), *choice.get("patternProperties", {}).values()):
            if isinstance(others, dict) and isinstance(value, dict):
                found |= {key: others for key in value if key not in found}
        if isinstance(value, list) and "items" in choice:
            found |= dict.fromkeys(range(len(value)), choice["items"])
    return found


def below(value: Any, step: str | int) -> Any:
    known = step in value if isinstance(value, dict) else isinstance(value, list) and step in range(len(value))
    return value[step] if known else None


def node_at(location: Location, value: Any, schema: dict[str, Any]) -> dict[str, Any]:
    node = schema
    for step in location:
        node = members(node, value, schema).get(step, {})
        value = below(value, step)
    return node


def dotted_keys(node: dict[str, Any], value: Any, schema: dict[str, Any], location: Location = ()) -> Iterator[str]:
    for step, inner in members(node, value, schema).items():
        here = (*location, step)
        yield dotted(here)
        if len(here) < MAX_DEPTH:
            yield from dotted_keys(inner, below(value, step), schema, here)


def nearest_key(key: str, document: Document, schema: dict[str, Any]) -> str | None:
    keys = list(dotted_keys(schema, document.value, schema))
    inside = [other for other in keys if other.endswith(f".{key}")]
    return inside[0] if inside else nearest(key, keys)


def nearest(word: str, words: Iterable[str]) -> str | None:
    spellings = {other.lower().replace("-", "_"): other for other in words}
    near = difflib.get_close_matches(word[:100].lower().replace("-", "_"), spellings, n=1)
    return spellings[near[0]] if near else None


def expected(node: dict[str, Any], schema: dict[str, Any]) -> str:
    """What to write: "an integer from 1 to 1024", "one of nf4, int8, none"."""
    phrases = []
    for choice in alternatives(node, schema):
        kind = choice.get("type")
        if "const" in choice:
            phrase = str(choice["const"])
        elif "enum" in choice:
            phrase = "one of " + ", ".join(map(str, choice["enum"]))
        elif kind in ("integer", "number"):
            phrase = ("an integer" if kind == "integer" else "a number") + bounds(choice)
        elif kind == "string":
            form = " that isn't empty" if "minLength" in choice else ""
            form = f" of the form {choice['pattern']}" if "pattern" in choice else form
            phrase = "a path" if choice.get("format") == "path" else f"text{form}"
        elif kind == "array":
            phrase = "a list" + (f" of {choice['minItems']} or more" if "minItems" in choice else "")
        else:
            phrase = {"boolean": "true or false", "null": "null", "object": "a mapping"}.get(str(kind), "another value")
        phrases.append(phrase)
    return " or ".join(dict.fromkeys(phrases))


def bounds(node: dict[str, Any]) -> str:
    low, above = node.get("minimum"), node.get("exclusiveMinimum")
    high, under = node.get("maximum"), node.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    lower = f" of at least {low}" if low is not None else f" above {above}" if above is not None else ""
    upper = f" of at most {high}" if high is not None else f" below {under}" if under is not None else ""
    return f"{lower} and{upper}" if lower and upper else lower + upper


# Words


def shorten(text: object, width: int = 60) -> str:
    """Text on one line, cut in its middle."""
    line = "".join(character if character.isprintable() else "?" for character in str(text))
    return line if len(line) <= width else f"{line[: width // 2]}...{line[-(width // 2 - 3) :]}"


def dotted(location: Location) -> str:
    return ".".join(shorten(step, 40) for step in location)


def seen(value: Any) -> str:
    if isinstance(value, str):
        return f"'{shorten(value)}'"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "null" if value is None else str(value).lower()


def problem(message: str) -> PydanticCustomError:
    """For a validator to raise: its text is the message as it is."""
    return PydanticCustomError("recipe", "{message}", {"message": message})


def problem_at(cls: type, location: tuple[str, ...], message: str, value: Any) -> ValidationError:
    detail = InitErrorDetails(type=problem(message), loc=location, input=value)
    return ValidationError.from_exception_data(cls.__name__, [detail])


def explain(document: Document, errors: Sequence[ErrorDetails], schema: dict[str, Any]) -> list[Problem]:
    """Pydantic's errors as locations in the document and short messages."""
    located = [(_written_location(error, document.value), error) for error in errors]
    problems: dict[Location, str] = {}
    meant: set[Location] = set()
    for location, error in sorted(located, key=lambda entry: entry[1]["type"] == "missing"):
        # One branch of a union may have got further than the other; only that one is told.
        if any(other[: len(location)] == location != other for other, _ in located):
            continue
        value: Any = document.value
        for step in location[:-1]:
            value = below(value, step)
        parent = node_at(location[:-1], document.value, schema)
        if error["type"] == "extra_forbidden":
            keys = [str(key) for key in members(parent, value, schema)]
            near = nearest(str(location[-1]), keys)
            meant.add((*location[:-1], near or ""))
            place = document.place(location).text
            if place.startswith("--set "):
                near = nearest_key(place.removeprefix("--set "), document, schema) or near
            near = near or nearest_key(str(location[-1]), document, schema)
            advice = f"Did you mean {near!r}?" if near else f"Keys here: {shorten(', '.join(keys), 150)}."
            problems[location] = f"unknown key. {advice}"
        elif error["type"] == "missing":
            about = node_at(location, document.value, schema).get("description", "it is needed")
            if location not in meant:
                problems[location] = f"missing: {shorten(about.rstrip('.'), 150)}."
        else:
            problems[location] = _wrong_value(error, location, document.value, schema)
    return list(problems.items())


def _written_location(error: ErrorDetails, value: Any) -> Location:
    """Where an error is in the document: pydantic's location without the names of union branches."""
    location: Location = ()
    for number, step in enumerate(error["loc"], 1):
        known = step in value if isinstance(value, dict) else isinstance(value, list) and step in range(len(value))
        if known or (number == len(error["loc"]) and error["type"] == "missing"):
            location = (*location, step)
            value = below(value, step)
    return location


def _wrong_value(error: ErrorDetails, location: Location, document: Any, schema: dict[str, Any]) -> str:
    if error["type"] not in BUILT_IN_ERRORS:
        return shorten(error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, "), 240)
    if error["loc"][-1:] == ("[key]",):
        return f"a name here has the form {error.get('ctx', {}).get('pattern')}."
    value = document
    for step in location:
        value = below(value, step)
    wanted = expected(node_at(location, document, schema), schema)
    if isinstance(value, str) and wanted == "true or false":
        wanted = BOOLEAN_WORDS.get(value.lower(), wanted)
    return f"got {seen(value)}; write {wanted}."


def refusal(document: Document, problems: Iterable[Problem]) -> RecipeError:
    """One line a problem, in the order of the file."""
    lines = []
    for location, message in sorted(problems, key=lambda problem: document.place(problem[0]).line):
        place = document.place(location).text
        key = dotted(location)
        lines.append(f"{place}: {message}" if place == f"--set {key}" or not key else f"{place}: {key}: {message}")
    hidden = len(lines) - MAX_PROBLEMS
    return RecipeError("\n".join(lines[:MAX_PROBLEMS] + ([f"... and {hidden} more."] if hidden > 0 else [])))
