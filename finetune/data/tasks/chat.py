"""Conversations as they are: rows of messages with media anywhere in the user's turns."""

from typing import Any

from pydantic import Field

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.data.metrics import means
from finetune.data.metrics.text import FREE_TEXT, free_text
from finetune.data.sample import Answer, Medium, Message, Row, Sample

HEADS = ("language",)
PRIMARY = "token_f1"
ROLES = ("system", "user", "assistant")


class Options(PartOptions):
    media: tuple[str, ...] = Field(("image",), description="Kinds of media that the conversations carry.")


def media(options: Options) -> tuple[str, ...]:
    return options.media


def sample(row: Row, options: Options) -> Sample:
    messages = row.columns.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row.where}: 'messages' is not a list of turns")
    turns = tuple(_message(row, number, message, options) for number, message in enumerate(messages))
    if turns[-1].role != "assistant":
        raise DataError(f"{row.where}: the last turn is the {turns[-1].role}'s; nothing to learn from it")
    return Sample(turns, row.where, "chat")


def read(answer: Answer, options: Options) -> str:
    return answer.text.strip()


def measure(prediction: str, target: str, options: Options) -> dict[str, Any]:
    return free_text(prediction, [target])


def score(rows: list[dict[str, Any]], options: Options) -> dict[str, float]:
    """Means over rows: the answer letter for letter, F1 of its words, F1 of its longest common subsequence."""
    return means(rows, FREE_TEXT)


def _message(row: Row, number: int, message: Any, options: Options) -> Message:
    place = f"{row.where}: messages.{number}"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise DataError(
            f"{place}: a turn is {{'role': one of {', '.join(ROLES)}, 'content': ...}}; got {str(message)[:80]}"
        )
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise DataError(f"{place}: 'content' is neither text nor a list of parts")
    return Message(message["role"], tuple(_part(row, place, part, message["role"], options) for part in parts))


def _part(row: Row, place: str, part: Any, role: str, options: Options) -> str | Medium:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in options.media and part.get(kind) is not None:
        if role == "assistant":
            raise DataError(f"{place}: the assistant can't answer with media")
        return row.medium(kind, part[kind])
    known = ", ".join(("text", *options.media))
    raise DataError(
        f"{place}: a part is {{'type': T, T: ...}} with T one of {known} (the task's `media` names them); got "
        f"{str(part)[:80]}"
    )
