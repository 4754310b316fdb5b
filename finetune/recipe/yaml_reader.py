"""A strict YAML reader that knows the line of every key, and a writer whose output it reads back.

PyYAML parses; the values are built here from its nodes. Plain scalars follow YAML 1.2 (`2e-4` is a number; `no`, `on`,
`0o17`, `1:30` and `2024-01-01` stay text), keys are always text. Tags, anchors and aliases are refused.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from finetune.common.errors import RecipeError
from finetune.common.registry import nearest
from finetune.recipe.words import MAX_DEPTH, Location, dotted, shorten

ROWS = (".csv", ".tsv", ".xlsx", ".xls", ".jsonl", ".parquet")  # suffixes of what isn't a recipe
MAX_BYTES = 2**20
MAX_DIGITS = 18
MAX_NODES = 16_384  # keys, values and entries, which take a second
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


class Place(NamedTuple):
    line: int  # from 1; 0 for what isn't in a file
    text: str  # "recipes/x.yaml:14" or "--set train.seed"


@dataclass
class Document:
    """A value of dicts, lists and scalars, and where each key and entry of it is written."""

    value: Any
    places: dict[Location, Place] = field(default_factory=dict)

    def place(self, location: Location) -> Place:
        """The place of a key; of a key that isn't written, that of the nearest one above it."""
        while location not in self.places:
            location = location[:-1]
        return self.places[location]


def read_yaml(text: str, name: str, numbered: bool = True) -> Document:
    """Read one document. Raises RecipeError with `name`, and the line if `numbered`, for all that isn't plain YAML."""
    lines: dict[Location, int] = {(): 1}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = _value(node, (), lines) if node else None
        return Document(value, {location: _place(name, line, numbered) for location, line in lines.items()})
    except _Refused as error:
        line, reason, location = error.args
        reason = f"{shorten(dotted(location), 100)}: {reason}" if location else reason
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line if mark else 0
        reason = "invalid YAML: " + shorten(", ".join(part for part in (error.context, error.problem) if part), 200)
        if "'\\t'" in reason:
            reason = "a tab can't indent; use spaces"
        elif "flow" in reason:
            reason += "; inside { } or [ ], quote text that has ? : , or #"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        reason = f"a control character, {text[error.position]!r}; remove it"
    except (ValueError, OverflowError):  # PyYAML lets these through for escapes like "\UFFFFFFFF"
        line = loader.line
        reason = "invalid YAML: an escape or directive that can't be read"
    raise RecipeError(f"{_place(name, line + 1, numbered).text}: {reason}.")


def _place(name: str, line: int, numbered: bool) -> Place:
    return Place(line, f"{name}:{line}") if numbered else Place(0, name)


class _Refused(Exception):
    """(line from 0, reason, location) of valid YAML that has no place in a recipe."""


class _Loader(yaml.BaseLoader):
    """Refuses what could grow without bound, or build an object, while it is still an event."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.location: Location = ()
        self.nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: yaml.Node | int | None) -> yaml.Node | None:
        """`index`: the key of a value in a mapping, the number of an entry in a list."""
        above = self.location
        if parent is not None:
            step = index.value if isinstance(index, yaml.ScalarNode) else index
            self.location = (*above, step if isinstance(step, str | int) else "?")
        self.nodes += 1
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if reason := self._refusal(event):
            raise _Refused(event.start_mark.line, reason, above if index is None else self.location)
        node = super().compose_node(parent, index)  # type: ignore[arg-type]  # typed as of lists alone
        self.location = above
        return node

    def _refusal(self, event: Any) -> str | None:
        if event.anchor is not None:
            return "anchors and aliases (& and *) aren't supported; write the value out"
        if getattr(event, "tag", None) is not None:
            return f"tags ({shorten(event.tag, 40)}) aren't supported; remove it"
        if self.nodes > MAX_NODES:
            return f"more than {MAX_NODES:,} keys and values; is it a recipe? Many files can be one source, a folder"
        if len(self.location) > MAX_DEPTH:
            return f"nested deeper than {MAX_DEPTH} levels"
        if re.search("[\0\ud800-\udfff]", getattr(event, "value", "")):
            return "text with a NUL or half a surrogate pair"
        return None


def _value(node: yaml.Node, location: Location, lines: dict[Location, int]) -> Any:
    """The value of a node; the lines of what is in it are added to `lines`."""
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, location)
    if isinstance(node, yaml.SequenceNode):
        items: list[Any] = []
        for item in node.value:
            below = (*location, len(items))
            lines[below] = item.start_mark.line + 1
            items.append(_value(item, below, lines))
        return items
    mapping: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _Refused(key.start_mark.line, "a list or mapping used as a key; a key is text", location)
        below = (*location, key.value)
        if key.value in mapping:
            raise _Refused(key.start_mark.line, f"written twice, first in line {lines[below]}", below)
        lines[below] = key.start_mark.line + 1
        mapping[key.value] = _value(value, below, lines)
    return mapping


def _scalar(node: yaml.ScalarNode, location: Location) -> str | int | float | bool | None:
    text: str = node.value
    if node.style is not None:  # quoted, or a block
        return text
    if text in CONSTANTS:
        return CONSTANTS[text]
    if INTEGER.fullmatch(text):
        if len(text) > MAX_DIGITS:
            reason = f"a number of more than {MAX_DIGITS} digits; quote it if it is text"
            raise _Refused(node.start_mark.line, reason, location)
        return int(text)
    if FLOAT.fullmatch(text):
        if math.isinf(number := float(text)):
            reason = f"{shorten(text, 40)} is too large for a number; quote it if it is text"
            raise _Refused(node.start_mark.line, reason, location)
        return number
    return text


def rewritten(text: str, changes: Mapping[Location, str | None]) -> str:
    """The text of a document with other values at some places; comments, order and all else stay. A key that isn't
    written is added to its mapping, unless its value is None.
    """
    edits: list[tuple[int, int, str]] = []
    for location, value in changes.items():
        *above, last = location
        parent: Any = _Loader(text).get_single_node()
        for step in above:
            parent = _child(parent, step)
        node, written = _child(parent, last), "null" if value is None else _inline(value)
        if node is not None:
            start, end = node.start_mark.index, node.end_mark.index
            edits.append((start, start + len(text[start:end].rstrip()), written))
        elif value is not None:
            first = parent.value[0][0].start_mark
            behind = ", " if parent.flow_style else "\n" + " " * first.column
            edits.append((first.index, first.index, f"{last}: {written}{behind}"))
    for start, end, written in sorted(edits, reverse=True):
        text = text[:start] + written + text[end:]
    return text


def _child(node: yaml.Node, step: str | int) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return node.value[int(step)]
    return next((value for key, value in node.value if key.value == step), None)


def _inline(text: str) -> str:
    return text if re.fullmatch("[/A-Za-z][A-Za-z0-9._/-]*", text) else json.dumps(text, ensure_ascii=False)


def read_text(path: str | Path) -> str:
    if str(path).lower().endswith(ROWS):
        raise RecipeError(f"{path}: rows, not a recipe; `finetune init FILE` writes a recipe for them.")
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
    """Which file may be meant, by its name before the suffix."""
    folder, name = os.path.split(path)
    stem, suffix = os.path.splitext(name)
    try:
        others = sorted(set(os.listdir(folder or ".")) - {name}, key=lambda other: other.endswith(suffix))
    except (OSError, ValueError):
        return ""
    stems = {os.path.splitext(other)[0]: other for other in others}
    near = nearest(stem, stems)
    return f" Did you mean {shorten(stems[near])!r}?" if near else ""


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
