"""What tasks read from rows alike."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from finetune.common.errors import DataError
from finetune.data.sample import Medium, Message, Row

FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}  # ; -> ；


def ask(
    row: Row, prompt: str, media: Sequence[str], texts: Sequence[str] = (), transcript: str | None = None
) -> Message:
    """The user's turn: media, then the columns named by `texts` on lines of their own, then the prompt. Empty names
    are none. `transcript`: what the media show or say, for distill. Raises DataError.
    """
    content: list[str | Medium] = [*row.media(media, transcript)]
    lines = [text_of(row, column) for column in texts if column] + ([prompt] if prompt else [])
    if lines:
        content.append("\n".join(lines))
    if not content:
        raise DataError(f"{row.where}: nothing is asked: set the task's `media`, `text` or `prompt`")
    return Message("user", tuple(content))


def text_of(row: Row, column: str) -> str:
    """A column that holds text, or a number, true or false where the file has such. Raises DataError."""
    value = row.columns.get(column)
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return json.dumps(value)
    return row.text(column)


def transcript_of(row: Row, column: str) -> str | None:
    """What the media show or say, for distill; None where no column tells."""
    return row.text(column) if column else None


def number_of(row: Row, column: str) -> float:
    """A column that holds a finite number, or text that is one. Raises DataError."""
    text = text_of(row, column)
    with suppress(ValueError):
        number = float(text)
        if math.isfinite(number):
            return number
    raise DataError(f"{row.where}: column {column!r} holds {text[:40]!r}; write a number, like 3 or 4.5")


def value_of(row: Row, column: str) -> Any:
    """What a column holds, read as JSON where it is text that is a JSON list or object; None where it is empty or
    missing.
    """
    value = row.columns.get(column)
    if isinstance(value, str):
        value = value.strip()
        if value.startswith(("[", "{")):
            with suppress(ValueError, RecursionError):  # else text that begins with a bracket
                return json.loads(value)
    return None if value == "" else value


def split_at(text: str, separator: str) -> list[str]:
    """What stands between separators, or the full-width ones of a Chinese keyboard; without one, the text. None is
    empty.
    """
    pieces = text.replace(separator.translate(FULL_WIDTH), separator).split(separator) if separator else [text]
    return [piece.strip() for piece in pieces if piece.strip()]


def texts_of(row: Row, column: str, separator: str = "") -> list[str]:
    """A column that holds several texts: a list, or text that is a JSON list, or text split at `separator`; else one.
    Raises DataError where there is none.
    """
    value = value_of(row, column)
    if isinstance(value, list):
        found = [str(item).strip() for item in value if isinstance(item, str | int | float)]
        if len(found) != len(value) or not all(found) or not found:
            raise DataError(f"{row.where}: column {column!r} holds {str(value)[:60]}; write a list of texts")
        return found
    text = text_of(row, column)
    found = split_at(text, separator)
    if not found:
        raise DataError(f"{row.where}: column {column!r} holds {text[:60]!r}; write texts with {separator!r} between")
    return found
