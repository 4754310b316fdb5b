"""What a row of a file becomes: one conversation with its media in place."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


KINDS = ("image", "audio", "video")


@dataclass(frozen=True)
class Row:
    """One row of a file. `number` is the line that an editor shows; `columns` as the file has them."""

    path: Path
    number: int
    columns: dict[str, Any]
    media_folder: Path

    @property
    def where(self) -> str:
        return f"{self.path.name}:{self.number}"

    def text(self, column: str) -> str:
        """A column that must hold text. Raises DataError with row and column."""
        value = self.columns.get(column)
        if not isinstance(value, str) or not value.strip():
            have = ", ".join(repr(name) for name in self.columns)
            seen = f"holds {value!r}" if column in self.columns else f"is missing (columns: {have})"
            raise DataError(f"{self.where}: column {column!r} {seen}; name another with `columns: {{{column}: ...}}`")
        return value.strip()

    def media(self, kinds: Sequence[str], text: str | None = None) -> tuple["Medium", ...]:
        """The media of these kinds, each from the column of its name: a path, or a list of them. Pictures come first,
        then sound, then video, as where a model is asked. `text`: what they show or say together. Raises DataError.
        """
        found: list[Medium] = []
        for kind in sorted(kinds, key=KINDS.index):
            value = self.columns.get(kind)
            names = value if isinstance(value, list) else [self.text(kind)]
            for name in names:
                if not isinstance(name, str):
                    raise DataError(f"{self.where}: column {kind!r} holds {str(name)[:40]!r}; write a path")
                found.append(self.medium(kind, name, "" if found and text is not None else text))
        return tuple(found)

    def medium(self, kind: str, name: str, text: str | None = None) -> "Medium":
        """A medium named relative to the media folder, which it may not leave. `text`: what it shows or says, where
        the row tells. Raises DataError.
        """
        if "://" in name:
            raise DataError(f"{self.where}: {name!r} is an address; media are read from files")
        path = (self.media_folder / name).resolve()
        if not path.is_relative_to(self.media_folder.resolve()):
            raise DataError(
                f"{self.where}: {name!r} leads to {path}, outside {self.media_folder}; set `media_folder` to a folder "
                "above"
            )
        if not path.is_file():
            raise DataError(f"{self.where}: no such {kind}: {path}")
        return Medium(kind, path, text)


@dataclass(frozen=True)
class Medium:
    """`kind` is also the name of the encoder that reads it. `text`: its caption or transcript, where it is known; what
    `distill` puts in its place, '' where another medium's text tells of this one too.
    """

    kind: str
    path: Path
    text: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Layout:
    """What a medium becomes before projection: `len(marks)` segments (tiles of a picture, frames of a clip, windows of
    a recording) of `rows` rows of features each. `marks`: the text put before each segment, '' for none.
    """

    rows: int
    marks: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Prepared:
    """A decoded medium as its encoder reads it: float32 `values` of any shape, without batch axis."""

    values: "Tensor"
    layout: Layout


@dataclass(frozen=True)
class Message:
    """One turn. `content` is text and media in the order in which they are read."""

    role: str
    content: tuple[str | Medium, ...]


@dataclass(frozen=True)
class Sample:
    """A conversation whose last turn is the assistant's: the answer that is asked for."""

    messages: tuple[Message, ...]
    where: str
    task: str = ""
    media: tuple[Medium, ...] = field(init=False)

    def __post_init__(self) -> None:
        found = tuple(part for message in self.messages for part in message.content if isinstance(part, Medium))
        object.__setattr__(self, "media", found)

    @property
    def answer(self) -> str:
        return "".join(part for part in self.messages[-1].content if isinstance(part, str))

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
