"""Shared by the formats of conversations: media listed beside the turns are put where the turns mark them."""

import re
from collections.abc import Mapping
from typing import Any

from finetune.common.errors import DataError
from finetune.data.formats import Columns
from finetune.data.formats._preferences import with_answers, with_media

KINDS = {"image": ("image", "images"), "audio": ("audio", "audios"), "video": ("video", "videos")}
MARKER = re.compile(r"\n?<(image|audio|video)>\n?")
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "bing", "bard"), "assistant"),
    "system": "system",
}
URLS = {"image_url": "image", "audio_url": "audio", "video_url": "video"}  # parts of the OpenAI API, and of servers
TOOLS = {"tool", "tools", "function", "function_call", "tool_call", "function_response", "observation", "ipython"}


def media_beside(item: Columns) -> dict[str, list[Any]]:
    """{kind: media in their order}, from the keys called after a kind, in singular or plural."""
    media: dict[str, list[Any]] = {}
    for kind, keys in KINDS.items():
        for value in (item[key] for key in keys if item.get(key) not in (None, "")):
            media.setdefault(kind, []).extend(value if isinstance(value, list) else [value])
    return media


def placed(text: str, media: dict[str, list[Any]], where: str) -> str | list[Columns]:
    """Replace the markers `<image>`, `<audio>`, `<video>` of a text, and the newlines around them, by media taken from
    the front of their lists; a marker of a kind without a list stays text. Raises DataError.
    """
    parts: list[Columns] = []
    done = 0
    for match in MARKER.finditer(text):
        kind = match[1]
        if kind not in media:
            continue
        if not media[kind]:
            raise DataError(f"{where}: more markers <{kind}> than media under {' or '.join(map(repr, KINDS[kind]))}")
        parts += [{"type": "text", "text": text[done : match.start()]}] if match.start() > done else []
        parts.append({"type": kind, kind: media[kind].pop(0)})
        done = match.end()
    if not parts:
        return text
    return parts + ([{"type": "text", "text": text[done:]}] if done < len(text) else [])


def check_all_placed(media: Mapping[str, list[Any]], where: str) -> None:
    """Raises DataError if a medium listed beside the turns has no place in them."""
    for kind, left in media.items():
        if left:
            keys = " or ".join(map(repr, KINDS[kind]))
            raise DataError(
                f"{where}: {len(left)} of the media under {keys} have no marker <{kind}> in the user's turns: "
                f"{str(left[0])[:80]!r}"
            )


def read_turns(where: str, columns: Columns) -> Columns:
    """Columns of any container, its conversations, if it has any, as `messages`."""
    if isinstance(columns.get("conversations"), list):
        return with_messages(where, columns, strict=False)
    return with_parts(where, columns)


def with_messages(where: str, item: Columns, strict: bool) -> Columns:
    """An item of `conversations` ({"from", "value"}) with `messages` in their place, its other keys kept.

    `strict`: a marker in a user's turn is always a medium; else `<audio>` and `<video>` are text in an item without
    such media. Raises DataError.
    """
    turns = item.get("conversations")
    if not isinstance(turns, list):
        raise DataError(f"{where}: 'conversations' is {str(turns)[:40]!r}, not a list of turns")
    media = media_beside(item)
    for kind in KINDS if strict else ("image",):
        media.setdefault(kind, [])
    messages = [_message(f"{where}: conversations.{index}", turn, media) for index, turn in enumerate(turns)]
    check_all_placed(media, where)
    system = item.get("system")
    if isinstance(system, str) and system.strip():
        if messages and messages[0]["role"] == "system":
            raise DataError(f"{where}: 'system' is beside the turns and the first of them; keep one")
        messages.insert(0, {"role": "system", "content": system})
    rest = {key: value for key, value in item.items() if key != "conversations"}
    return with_answers(where, rest | {"messages": messages})


def _with_instruction(where: str, item: Columns) -> Columns:
    """An item in the form of Alpaca and LLaMA-Factory: with `messages` made of `system`, `history`, `instruction` and
    `input`, and of the `output` if no `chosen` is beside it; others as they are. Raises DataError.
    """
    asked, more, answer = (item.get(key) for key in ("instruction", "input", "output"))
    if "messages" in item or not isinstance(asked, str) or not isinstance(more, str | None):
        return item
    if not isinstance(answer, str) and "chosen" not in item:
        return item
    system, history = item.get("system"), item.get("history") or []
    texts = [system] if isinstance(system, str) and system.strip() else []
    roles = ["system"] * len(texts)
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise DataError(f"{where}: 'history' is a list of [question, answer]; got {str(pair)[:80]}")
        texts += pair
        roles += ["user", "assistant"]
    texts.append("\n".join(filter(None, (asked, more))))
    roles.append("user")
    if isinstance(answer, str) and "chosen" not in item:
        texts.append(answer)
        roles.append("assistant")
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return item | {"messages": with_media(turns, item)}


def _message(place: str, turn: Any, media: dict[str, list[Any]]) -> Columns:
    keys = turn if isinstance(turn, dict) else {}
    name, text = keys.get("from", keys.get("role")), keys.get("value", keys.get("content"))
    if not isinstance(text, str):
        raise DataError(f"{place}: a turn is {{'from': who, 'value': text}}; got {str(turn)[:80]}")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        if isinstance(name, str) and name in TOOLS:
            raise DataError(f"{place}: a turn of {name!r}: tool calls aren't supported; remove such rows")
        raise DataError(f"{place}: 'from' is {name!r}; write one of {', '.join(ROLES)}")
    return {"role": role, "content": placed(text, media, place) if role == "user" else text}


def with_parts(where: str, columns: Columns) -> Columns:
    """Columns whose `messages`, if any, consist of parts {"type": T, T: ...}: those of the OpenAI API are rewritten,
    media listed beside the messages are put into them. Malformed messages and parts are left to the task to report.
    Raises DataError.
    """
    columns = with_answers(where, _with_instruction(where, columns))
    if not isinstance(columns.get("messages"), list):
        return columns
    media = media_beside(columns)
    embedded: set[str] = set()  # kinds whose parts hold their media: a column of that name is just a column
    messages = []
    for index, message in enumerate(columns["messages"]):
        content = message.get("content") if isinstance(message, dict) else None
        place = f"{where}: messages.{index}"
        if isinstance(content, str) and message.get("role") == "user":
            content = placed(content, media, place)
        elif isinstance(content, list):
            content = [_part(place, part, media, embedded) for part in content]
        messages.append(message | {"content": content} if isinstance(message, dict) else message)
    check_all_placed({kind: left for kind, left in media.items() if kind not in embedded}, where)
    return columns | {"messages": messages}


def _part(place: str, part: Any, media: dict[str, list[Any]], embedded: set[str]) -> Any:
    name = part.get("type") if isinstance(part, dict) else None
    if not isinstance(name, str):
        return part
    if name in URLS:
        kind, value = URLS[name], part.get(name)
        value = value.get("url") if isinstance(value, dict) else value
    elif name == "input_audio":
        kind, sound = "audio", part.get(name)
        data, form = (sound.get("data"), sound.get("format")) if isinstance(sound, dict) else (None, None)
        value = f"data:audio/{form or 'wav'};base64,{data}" if isinstance(data, str) else None
    elif name in KINDS:
        kind, value = name, part.get(name)
        if value is None:
            if not media.get(kind):
                raise DataError(
                    f"{place}: a part {{'type': {kind!r}}}, but no medium for it under {kind!r} or '{kind}s'"
                )
            return {"type": kind, kind: media[kind].pop(0)}
    else:
        return part
    if name not in KINDS and not isinstance(value, str):
        raise DataError(f"{place}: a part of type {name!r} without its {'data' if name == 'input_audio' else 'url'}")
    embedded.add(kind)
    return {"type": kind, kind: value}
