"""What tasks share: options of a question, and reading the columns of a row."""

import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeAlias

from pydantic import Field

from finetune.common.errors import DataError
from finetune.data.sample import Medium, Message, Row
from finetune.data.tasks import Prompt, TaskOptions, Transcript

FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}  # ; -> ；

TextColumns: TypeAlias = str | tuple[str, ...]


class QuestionOptions(TaskOptions):
    """Options of a task that asks a question about the media and a text of a row."""

    prompt: Prompt = ""
    text: TextColumns = Field(
        "", description="Column of text put before the question, or a list of them, each on its own line; '' for none."
    )


NUMBER = r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


# 99,00 and 1.234,50; not 1,234, which may be a thousand.
DECIMAL_COMMA = re.compile(r"\s*[-+]?(?:0|\d{4,}|\d{1,3}(?:\.\d{3})+|\d{1,3}(?=,(?!\d{3}\s*$))),\d+\s*")


def number_from(text: str) -> float | None:
    """The finite number that is the whole text, also with a decimal comma; None if it is none, or isn't clear."""
    if DECIMAL_COMMA.fullmatch(text):
        text = text.replace(".", "").replace(",", ".")
    with suppress(ValueError):
        number = float(text)
        if math.isfinite(number):
            return number
    return None


def numbers_in(text: str) -> list[float]:
    return [float(number) for number in re.findall(NUMBER, text)]


class DistillableOptions(QuestionOptions):
    """The same for a task whose answers don't describe the media."""

    transcript: Transcript = ""


def question(row: Row, options: DistillableOptions, *columns: str, prompt: str | None = None) -> Message:
    """The user's turn of a task with these options; further `columns` come behind its text, and `prompt` replaces the
    option. Raises DataError.
    """
    texts = (*listed(options.text), *columns)
    transcript = row.text(options.transcript) if options.transcript else None
    return user_turn(row, options.media, texts, options.prompt if prompt is None else prompt, transcript)


def user_turn(
    row: Row, media: Sequence[str], texts: Sequence[str], prompt: str, transcript: str | None = None
) -> Message:
    """Media, then the columns of `texts` and the prompt, each on a line of its own; empty ones are left out.
    `transcript`: what the media show or say, for `distill`. Raises DataError.
    """
    content: list[str | Medium] = [*row.media(media, transcript)]
    lines = [row.text(column) for column in texts if column] + ([prompt] if prompt else [])
    if lines:
        content.append("\n".join(lines))
    if not content:
        raise DataError(f"{row.where}: the question is empty: set the task's `media`, `text` or `prompt`")
    return Message("user", tuple(content))


def listed(columns: TextColumns) -> tuple[str, ...]:
    return (columns,) if isinstance(columns, str) else columns


def number_of(row: Row, column: str) -> float:
    """A column that holds a finite number, or the text of one. Raises DataError."""
    text = row.text(column)
    if (number := number_from(text)) is not None:
        return number
    unclear = re.fullmatch(r"[-+]?\d{1,3},\d{3}", text.strip())
    example = f"{text.replace(',', '')} or {text.replace(',', '.')}" if unclear else "3 or 4.5"
    raise DataError(f"{row.where}: {row.called(column)} holds {text[:40]!r}; write a number, like {example}")


def value_of(row: Row, column: str) -> Any:
    """The value of a column; text that is a JSON list or object is parsed. None if it is empty or missing."""
    value = row.columns.get(column)
    if isinstance(value, str):
        value = value.strip()
        if value.startswith(("[", "{")):
            with suppress(ValueError, RecursionError):  # then it is text that begins with a bracket
                return json.loads(value)
    return None if value == "" else value


def split_at(text: str, separator: str) -> list[str]:
    """The non-empty pieces of a text between separators, or their full-width forms on a Chinese keyboard. An empty
    separator splits nothing.
    """
    pieces = text.replace(separator.translate(FULL_WIDTH), separator).split(separator) if separator else [text]
    return [piece.strip() for piece in pieces if piece.strip()]


def texts_of(row: Row, column: str, separator: str = "") -> list[str]:
    """A column of one text or more: a list, JSON of a list, or text split at `separator`. Raises DataError if there is
    none.
    """
    value = value_of(row, column)
    if isinstance(value, list):
        texts = [str(item).strip() for item in value if isinstance(item, str | int | float)]
        if len(texts) != len(value) or not all(texts) or not texts:
            raise DataError(f"{row.where}: {row.called(column)} holds {str(value)[:60]}; write a list of texts")
        return texts
    text = row.text(column)
    texts = split_at(text, separator)
    if not texts:
        raise DataError(
            f"{row.where}: {row.called(column)} holds {text[:60]!r}; write texts with {separator!r} between"
        )
    return texts
