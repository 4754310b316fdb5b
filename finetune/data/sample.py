"""A row of a file, and the sample that it becomes: one conversation with its media in place."""

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from finetune.common.errors import DataError, MediaError, MissingColumn, escaped
from finetune.data.fetch import fetched
from finetune.data.media_index import media_index
from finetune.data.media_store import data_uri_content, stored
from finetune.recipe.schema import Limits

if TYPE_CHECKING:
    from torch import Tensor

Values: TypeAlias = "Tensor | Mapping[str, Tensor]"


KINDS = ("image", "audio", "video")


@dataclass(frozen=True)
class Row:
    """One record of a source. `number`: the line that an editor shows; `columns`: as in the file.

    Media are files in `media_folder`, anywhere with `outside_media_folder`, or addresses of `hosts`; `max_bytes` limits
    embedded and downloaded ones. `names`: the task's column -> the file's, where they differ. `root`: the media folder
    with its links followed, where that is known. `file`: relative to `path`, of a row that is one file of that folder.
    """

    path: Path
    number: int
    columns: dict[str, Any]
    media_folder: Path
    outside_media_folder: bool = False
    hosts: tuple[str, ...] = ()
    max_bytes: int = Limits().max_bytes
    names: Mapping[str, str] = field(default_factory=dict)
    root: str = ""
    file: str = ""

    @property
    def where(self) -> str:
        """ "rows.csv:12", or "pictures/cats/1.jpg"."""
        place = f"{self.path.name}/{self.file}" if self.file else f"{self.path.name}:{self.number}"
        return place if place.isprintable() else escaped(place).replace("\n", "\\n")

    def called(self, column: str) -> str:
        """A column as messages name it: by the file's own name, with the task's where that is another."""
        own = self.names.get(column, column)
        return (
            f"column {own!r} (the task's {column!r})" if own != column and own in self.columns else f"column {column!r}"
        )

    def text(self, column: str) -> str:
        """A column that must hold text; a number or boolean is written as JSON. Raises DataError, with the row."""
        value = self.columns.get(column)
        if isinstance(value, bool | int | float) and math.isfinite(value):
            value = json.dumps(value)
        if not isinstance(value, str) or not value.strip():
            have = ", ".join(repr(name) for name in self.columns)
            if column in self.columns:
                raise DataError(
                    f"{self.where}: {self.called(column)} holds {value!r}: fill it in, or leave the row out"
                )
            raise MissingColumn(
                f"{self.where}: column {column!r} is missing (columns: {have}); say which it is with "
                f"`columns: {{{column}: ...}}`",
                column,
            )
        return value.strip()

    def media(self, kinds: Sequence[str], text: str | None = None) -> tuple["Medium", ...]:
        """The media of these kinds, each from the column of its name: a value that `medium` takes, or a list of them.
        Pictures come first, then sound, then video. `text`: what they show or say together. Raises DataError.
        """
        media: list[Medium] = []
        for kind in sorted(kinds, key=KINDS.index):
            value = self.columns.get(kind)
            if isinstance(value, str) or value is None:
                value = self.text(kind)
            for one in value if isinstance(value, list) else [value]:
                media.append(self.medium(kind, one, "" if media and text is not None else text))
        return tuple(media)

    def medium(self, kind: str, value: Any, text: str | None = None) -> "Medium":
        """A medium that a row names or holds: a path relative to the media folder, which it may not leave; an address;
        a data URI; bytes; or {"bytes": ..., "path": ...}. A `Path` is one that a format vouches for. `text`: what it
        shows or says, where the row tells. Raises DataError.
        """
        cell = value
        if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str) and value.startswith("data:"):
            value = data_uri_content(value, self.where)
        if isinstance(value, bytes | bytearray):
            return Medium(kind, stored(bytes(value), self.where, self.max_bytes), text, self.where)
        if isinstance(value, str) and "://" in value:
            return Medium(kind, fetched(value, self.hosts, self.where, self.max_bytes), text, self.where)
        if not isinstance(value, str | Path):
            raise DataError(f"{self.where}: {self.called(kind)} holds {str(cell)[:40]!r}; write a path")
        path, named = self._file(kind, value)
        return Medium(kind, path, text, self.where, link="" if named == str(path) else named)

    def _file(self, kind: str, name: str | Path) -> tuple[Path, str]:
        """(where a file is, where it is without following links)."""
        root = self.root or os.path.realpath(self.media_folder)
        named = os.path.join(root, name)
        try:
            resolved = os.path.realpath(named)
            free = self.outside_media_folder or isinstance(name, Path)
            if not free and os.path.commonpath((root, resolved)) != root:
                raise DataError(
                    f"{self.where}: {name!r} leads to {resolved}, outside {self.media_folder}; set `media_folder` to a "
                    "folder above, or `outside_media_folder: true`"
                )
            resolved.encode()  # names that aren't UTF-8 fit no table, and no prediction could name them
            size = _size(resolved)
        except (OSError, ValueError) as error:  # too long for a name, or a character that no name may have
            raise DataError(f"{self.where}: {self.called(kind)} holds {str(name)[:40]!r}, no path ({error})") from None
        path = Path(resolved)
        if size:
            return path, named
        if size == 0:
            raise MediaError(f"{self.where}: {kind} of 0 bytes: {path}; copy it again, or leave the row out")
        advice = "; write / between folders" if "\\" in str(name) else ""
        raise MediaError(f"{self.where}: no such {kind}: {path}{advice}")


@dataclass(frozen=True)
class Medium:
    """A picture, recording or video. `kind` ("image", "audio", "video") is also the name of its encoder. `text`: its
    caption or transcript, which distillation puts in its place ('' where another medium's text covers this one too);
    None where unknown. `where`: the row that names it, for messages. `known_key`: its `key`, where it is known without
    the file. `content`: what a program holds in place of a file, its bytes or what `media.OBJECTS` take; `path` is then
    a name for messages, of this medium only. `link`: the path as the row names it, where that leads to `path` by
    links.
    """

    kind: str
    path: Path
    text: str | None = field(default=None, compare=False)
    where: str = field(default="", compare=False)
    known_key: str = field(default="", compare=False)
    content: object = field(default=None, compare=False, repr=False)
    link: str = field(default="", compare=False, repr=False)

    @cached_property
    def key(self) -> str:
        """sha256 of the file: renamed or copied media keep their features, changed ones don't."""
        if self.known_key:
            return self.known_key
        return media_index().sha256(self.path)

    @property
    def place(self) -> str:
        """Row and file, for messages."""
        if self.content is not None:
            return str(self.path)
        return f"{self.where}: {self.path}" if self.where else ""


@dataclass(frozen=True)
class Layout:
    """What a medium becomes before projection: `len(marks)` segments (tiles of a picture, frames of a clip, windows of
    a recording) of `rows` rows of features each. `marks`: the text put before each segment, '' for none; `end`: that
    behind the last. Where positions have three dimensions, `grid`: (frames, height, width) in patches, or (frames,) of
    a recording, and of a clip `grid_seconds`, those from one row of frames to the next.
    """

    rows: int
    marks: tuple[str, ...] = ("",)
    end: str = ""
    grid: tuple[int, ...] | None = None
    grid_seconds: float | None = None


@dataclass(frozen=True)
class Prepared:
    """A decoded medium as its encoder reads it: float32 `values` of any shape, without batch axis; or, for encoders of
    several inputs, all of them by name, as a batch of one.
    """

    values: "Values"
    layout: Layout

    @property
    def tensors(self) -> list["Tensor"]:
        return list(self.values.values()) if isinstance(self.values, Mapping) else [self.values]


@dataclass(frozen=True)
class Message:
    """One turn. `content` is text and media in the order in which they are read."""

    role: str
    content: tuple[str | Medium, ...]


def media_in(messages: Iterable[Message]) -> list[Medium]:
    return [part for message in messages for part in message.content if isinstance(part, Medium)]


def by_kind(media: Iterable[Medium]) -> dict[str, list[Medium]]:
    """{kind: its media}, in the order in which they come."""
    kinds: dict[str, list[Medium]] = {}
    for medium in media:
        kinds.setdefault(medium.kind, []).append(medium)
    return kinds


def texts_in(messages: Iterable[Message]) -> list[str]:
    return [part for message in messages for part in message.content if isinstance(part, str)]


@dataclass(frozen=True)
class Answer:
    """What a head says to a question: `text` where it writes, the `probabilities` of the labels where it chooses, a
    `number` where it rates.
    """

    text: str = ""
    probabilities: Mapping[str, float] | None = None
    number: float | None = None


@dataclass(frozen=True)
class Sample:
    """A conversation whose last message is the answer. `where`: the row that it comes from. `task`: the name of its
    task binding. `target`: what predictions are scored against, as JSON holds it, where that is more than the answer.
    Samples of one `group` are compared with each other. `source`: the number of its source; `weight`: times it is used
    per epoch. `rejected`: a worse answer; `desirable`: whether the answer is a good one; None where the row has
    neither.
    """

    messages: tuple[Message, ...]
    where: str
    task: str = ""
    target: Any = None
    group: str = ""
    source: int = 0
    weight: float = 1.0
    rejected: str | None = None
    desirable: bool | None = None
    media: tuple[Medium, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "media", tuple(media_in(self.messages)))
        try:
            "".join(texts_in(self.messages)).encode()
        except UnicodeEncodeError as error:  # as JSON may escape it; no tokenizer takes it
            half = ascii(error.object[error.start])
            raise DataError(f"{self.where}: the text holds half a character, {half}; write the whole of it") from None

    @property
    def answer(self) -> str:
        return "".join(texts_in(self.messages[-1:]))

    def answered(self, answer: str) -> "Sample":
        """The same with another answer."""
        return replace(self, messages=(*self.question, Message(self.messages[-1].role, (answer,))))

    def in_words(self) -> "Sample":
        """The same with each medium's text in its place, on lines of its own."""
        return replace(self, messages=tuple(Message(m.role, (_in_words(m.content),)) for m in self.messages))

    @property
    def question(self) -> tuple[Message, ...]:
        return self.messages[:-1]


def _in_words(content: Sequence[str | Medium]) -> str:
    text, own_line = "", False
    for part in content:
        piece = (part.text or "") if isinstance(part, Medium) else part
        if text and piece and (own_line or isinstance(part, Medium)):
            text = text.rstrip() + "\n"
            piece = piece.lstrip()
        text += piece
        own_line = isinstance(part, Medium) if piece else own_line
    return text


def _size(file: str) -> int | None:
    """Bytes; None where there is no such file. Raises OSError."""
    try:
        status = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
