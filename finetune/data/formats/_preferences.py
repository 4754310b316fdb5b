"""Preference rows (pairs of answers, or single answers with a label) in the forms of trl, LLaMA-Factory and ShareGPT,
as `messages` that end with the chosen answer, with the text of the `rejected` one or with `desirable`.
"""

from collections.abc import Sequence
from typing import Any

from finetune.common.errors import DataError
from finetune.common.registry import nearest
from finetune.data.formats import Columns

KINDS = ("image", "audio", "video")
ASSISTANT = ("assistant", "gpt", "chatgpt", "model", "bot")


def with_answers(where: str, columns: Columns) -> Columns:
    """Columns in which `chosen`, `rejected` and `completion` may be turns, or whole conversations with an equal
    beginning; the question is in `messages`, `prompt` or that beginning. Others are left as they are. Raises DataError.
    """
    chosen, rejected = columns.get("chosen", columns.get("completion")), columns.get("rejected")
    question = columns.get("messages") if isinstance(columns.get("messages"), list) else columns.get("prompt")
    added: Columns = {}
    label = columns.get("label") if "completion" in columns else columns.get("kto_tag")
    if isinstance(label, bool):
        added["desirable"] = label
    if question is None and isinstance(chosen, list):
        beginnings = [chosen] if rejected is None else [chosen, rejected]
        question = _equal_beginning(where, beginnings)
    turns = question if isinstance(question, list) else []
    if isinstance(question, str):
        question = [{"role": "user", "content": question}]
    if not isinstance(question, list):
        return columns | added
    if rejected is not None:
        added["rejected"] = _text(where, "rejected", _behind(question, rejected))
    if chosen is None:
        if rejected is not None and turns and _role(turns[-1]) != "assistant":
            raise DataError(f"{where}: 'rejected' without 'chosen'{_meant(columns)} add the answer that is better")
        return columns | added
    if question and _role(question[-1]) == "assistant":
        raise DataError(f"{where}: the messages end with the assistant's turn, beside 'chosen': keep one of them")
    text = _text(where, "chosen" if "chosen" in columns else "completion", _behind(question, chosen))
    added["messages"] = [*with_media(question, columns), {"role": "assistant", "content": text}]
    return {key: value for key, value in columns.items() if key != "chosen" or isinstance(value, str)} | added


def _meant(columns: Columns) -> str:
    near = nearest("chosen", [name for name in columns if name != "rejected"])
    have = ", ".join(map(repr, columns))[:300]
    return f" (columns: {have})" + (f"; is {near!r} meant? Call it 'chosen', or" if near else ";")


def _equal_beginning(where: str, conversations: Sequence[Any]) -> list[Any]:
    """What conversations have before their last turns, which are answers. Raises DataError where that differs."""
    beginnings = [turns[:-1] if isinstance(turns, list) else None for turns in conversations]
    if any(turns != beginnings[0] for turns in beginnings):
        media = [{*_media(turns)} for turns in beginnings]
        what = ", media in one of them only" if any(other != media[0] for other in media) else ""
        raise DataError(
            f"{where}: the questions of 'chosen' and 'rejected' differ{what}; both must be equal up to the last turn"
        )
    return list(beginnings[0] or [])


def _behind(question: Sequence[Any], answer: Any) -> Any:
    """An answer without the question that it repeats."""
    count = len(question)
    repeats = isinstance(answer, list) and len(answer) > count and answer[:count] == list(question)
    return answer[count:] if repeats else answer


def _text(where: str, key: str, answer: Any) -> str:
    """The text of an answer: a text, a turn, or a list of one turn. Raises DataError."""
    if isinstance(answer, list):
        if len(answer) != 1:
            raise DataError(f"{where}: {key!r} holds {len(answer)} turns; write the assistant's one")
        answer = answer[0]
    if isinstance(answer, dict):
        if _role(answer) != "assistant":
            raise DataError(f"{where}: {key!r} is a turn of {_role(answer)!r}; write the assistant's")
        if kinds := sorted(set(_media([answer]))):
            raise DataError(
                f"{where}: {key!r} holds {' and '.join(kinds)}: media belong in the question, which both answers share"
            )
        answer = answer.get("content", answer.get("value"))
        if isinstance(answer, list):
            answer = "".join(str(part.get("text", "")) for part in answer if isinstance(part, dict))
    if not isinstance(answer, str):
        raise DataError(f"{where}: {key!r} holds {str(answer)[:60]!r}; write a text or the assistant's turn")
    return answer


def _role(turn: Any) -> str:
    name = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return "assistant" if name in ASSISTANT else str(name)


def _media(turns: Any) -> list[str]:
    """The kinds of media that turns hold."""
    contents = [turn.get("content") for turn in turns or [] if isinstance(turn, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return [kind for part in parts for kind in KINDS if str(part.get("type")).removesuffix("_url") == kind]


def with_media(question: Sequence[Any], columns: Columns) -> list[Any]:
    """The question with media that stand beside it, and have no place in it, before the first user's text."""
    beside = {kind: columns.get(kind) or columns.get(f"{kind}s") for kind in KINDS}
    parts: list[Columns] = []
    for kind, media in beside.items():
        placed = kind in _media(question) or any(f"<{kind}>" in str(_content(turn)) for turn in question)
        if media and not placed:
            parts += [{"type": kind}] * (len(media) if isinstance(media, list) else 1)
    turns = list(question)
    first = next((number for number, turn in enumerate(turns) if _role(turn) == "user"), None)
    if parts and first is not None:
        content = _content(turns[first])
        text = content if isinstance(content, list) else [{"type": "text", "text": content}]
        turns[first] = turns[first] | {"content": [*parts, *text]}
    return turns


def _content(turn: Any) -> Any:
    return turn.get("content") if isinstance(turn, dict) else None
