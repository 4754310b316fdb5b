"""What a row of a file becomes: one conversation with its media in place."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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
        from finetune.errors import DataError

        value = self.columns.get(column)
        if not isinstance(value, str) or not value.strip():
            have = ", ".join(repr(name) for name in self.columns)
            seen = f"holds {value!r}" if column in self.columns else f"is missing (columns: {have})"
            raise DataError(f"{self.where}: column {column!r} {seen}; name another with `columns: {{{column}: ...}}`")
        return value.strip()

    def medium(self, kind: str, name: str) -> "Medium":
        """A medium named relative to the media folder, which it may not leave. Raises DataError."""
        from finetune.errors import DataError

        path = (self.media_folder / name).resolve()
        if not path.is_relative_to(self.media_folder.resolve()):
            raise DataError(
                f"{self.where}: {name!r} lies outside {self.media_folder}; set `media_folder` to a folder above"
            )
        if not path.is_file():
            raise DataError(f"{self.where}: no such {kind}: {path}")
        return Medium(kind, path)


@dataclass(frozen=True)
class Medium:
    """`kind` is also the name of the encoder that reads it."""

    kind: str
    path: Path


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

    @property
    def question(self) -> tuple[Message, ...]:
        return self.messages[:-1]
