"""Conversations as they are: rows of messages, with media anywhere in the user's turns."""

from typing import Any

from pydantic import Field

from finetune.common.errors import DataError, MissingColumn
from finetune.data.formats import Columns
from finetune.data.sample import Medium, Message, Row, Sample
from finetune.data.tasks import TaskOptions, _free_text

HEADS = ("language",)
PRIMARY = "token_f1"
ROLES = ("system", "user", "assistant")


class Options(TaskOptions):
    media: tuple[str, ...] = Field(("image",), description="Kinds of media that the conversations contain.")


read, measure, score = _free_text.read, _free_text.measure, _free_text.score


def sample(row: Row, options: Options) -> Sample:
    if "messages" not in row.columns:
        raise MissingColumn(f"{row.where}: no column 'messages' (columns: {', '.join(row.columns)[:300]})", "messages")
    messages = row.columns["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row.where}: 'messages' is not a list of turns")
    turns = tuple(_turn(row, number, message, options) for number, message in enumerate(messages))
    if turns[-1].role != "assistant":
        raise DataError(
            f"{row.where}: the last turn is the {turns[-1].role}'s; end with the assistant's, which is learned"
        )
    return Sample(turns, row.where, "chat")


def stand_in(row: Row, options: Options) -> Columns:
    """A row without `messages` asks its `prompt` about its media."""
    messages = row.columns.get("messages")
    if messages is None:
        content = [{"type": kind, kind: row.columns[kind]} for kind in options.media if row.columns.get(kind)]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": row.text("prompt")}]}]
    if isinstance(messages, list) and not (
        messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
    ):
        messages = [*messages, {"role": "assistant", "content": "?"}]
    return {"messages": messages}


def _turn(row: Row, number: int, message: Any, options: Options) -> Message:
    where = f"{row.where}: messages.{number}"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise DataError(
            f"{where}: a turn is {{'role': one of {', '.join(ROLES)}, 'content': ...}}; got {str(message)[:80]}"
        )
    role, content = message["role"], message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise DataError(f"{where}: 'content' is neither text nor a list of parts")
    return Message(role, tuple(_part(row, where, part, role, options) for part in parts))


def _part(row: Row, where: str, part: Any, role: str, options: Options) -> str | Medium:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        text: str | Medium = part["text"]
        return text
    if kind in options.media and part.get(kind) is not None:
        if role == "assistant":
            raise DataError(f"{where}: the assistant can't answer with media")
        return row.medium(kind, part[kind])
    kinds = ", ".join(("text", *options.media))
    raise DataError(
        f"{where}: a part is {{'type': T, T: ...}} with T one of {kinds}; got {str(part)[:80]}; add further media "
        "to the task's `media`"
    )
