"""What the formats of conversations share: media that stand beside the turns, put where the turns mark them."""

import re
from collections.abc import Mapping
from typing import Any

from finetune.common.errors import DataError

KINDS = {"image": ("image", "images"), "audio": ("audio", "audios"), "video": ("video", "videos")}
MARKER = re.compile(r"\n?<(image|audio|video)>\n?")
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "bing", "bard"), "assistant"),
    "system": "system",
}
URLS = {"image_url": "image", "audio_url": "audio", "video_url": "video"}  # parts of the OpenAI API, and of servers
TOOLS = {"tool", "tools", "function", "function_call", "tool_call", "function_response", "observation", "ipython"}


def media_beside(item: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{kind: its media in their order} for each kind that a key of the item is called after, in singular or plural."""
    found: dict[str, list[Any]] = {}
    for kind, keys in KINDS.items():
        for value in (item[key] for key in keys if item.get(key) not in (None, "")):
            found.setdefault(kind, []).extend(value if isinstance(value, list) else [value])
    return found


def placed(text: str, media: dict[str, list[Any]], where: str) -> str | list[dict[str, Any]]:
    """Text whose markers `<image>`, `<audio>`, `<video>` are replaced by media, taken from the front of their lists; a
    marker of a kind that there is no list of is text. Newlines around a marker go with it. Raises DataError.
    """
    parts: list[dict[str, Any]] = []
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
    """Raises DataError where a medium stands beside the turns, but nowhere in them."""
    for kind, left in media.items():
        if left:
            told = f"{len(left)} of the media under {' or '.join(map(repr, KINDS[kind]))} have no marker <{kind}>"
            raise DataError(f"{where}: {told} in the user's turns: {str(left[0])[:80]!r}")


def read_turns(where: str, columns: dict[str, Any]) -> dict[str, Any]:
    """Columns of a container that may hold anything, with the `messages` that its conversations make, if it has any."""
    if isinstance(columns.get("conversations"), list):
        return with_messages(where, columns, strict=False)
    return with_parts(where, columns)


def with_messages(where: str, item: dict[str, Any], strict: bool) -> dict[str, Any]:
    """An item of `conversations` ({"from", "value"}) with `messages` in their place, its other keys kept.

    `strict`: a marker in a user's turn always stands for a medium; else it may be text where the item has none, but
    for `<image>`. Raises DataError.
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
            raise DataError(f"{where}: 'system' stands beside the turns and in the first of them; keep one")
        messages.insert(0, {"role": "system", "content": system})
    return {key: value for key, value in item.items() if key != "conversations"} | {"messages": messages}


def _message(place: str, turn: Any, media: dict[str, list[Any]]) -> dict[str, Any]:
    said = turn if isinstance(turn, dict) else {}
    name, text = said.get("from", said.get("role")), said.get("value", said.get("content"))
    if not isinstance(text, str):
        raise DataError(f"{place}: a turn is {{'from': who, 'value': text}}; got {str(turn)[:80]}")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        if isinstance(name, str) and name in TOOLS:
            raise DataError(f"{place}: a turn of {name!r}: calls of tools aren't read here; take such rows out")
        raise DataError(f"{place}: 'from' is {name!r}; write one of {', '.join(ROLES)}")
    return {"role": role, "content": placed(text, media, place) if role == "user" else text}


def with_parts(where: str, columns: dict[str, Any]) -> dict[str, Any]:
    """Columns whose `messages`, where they have them, are made of parts {"type": T, T: ...}: parts of the OpenAI API
    rewritten, media beside the messages put into them. What isn't a message or a part is left for the task to tell.
    Raises DataError.
    """
    if not isinstance(columns.get("messages"), list):
        return columns
    media = media_beside(columns)
    own: set[str] = set()  # kinds whose parts hold their media themselves: a column beside them is just a column
    messages = []
    for index, message in enumerate(columns["messages"]):
        content = message.get("content") if isinstance(message, dict) else None
        place = f"{where}: messages.{index}"
        if isinstance(content, str) and message.get("role") == "user":
            content = placed(content, media, place)
        elif isinstance(content, list):
            content = [_part(place, part, media, own) for part in content]
        messages.append(message | {"content": content} if isinstance(message, dict) else message)
    check_all_placed({kind: left for kind, left in media.items() if kind not in own}, where)
    return columns | {"messages": messages}


def _part(place: str, part: Any, media: dict[str, list[Any]], own: set[str]) -> Any:
    name = part.get("type") if isinstance(part, dict) else None
    if name in URLS:
        kind, held = URLS[name], part.get(name)
        value = held.get("url") if isinstance(held, dict) else held
    elif name == "input_audio":
        kind, held = "audio", part.get(name)
        data, form = (held.get("data"), held.get("format")) if isinstance(held, dict) else (None, None)
        value = f"data:audio/{form or 'wav'};base64,{data}" if isinstance(data, str) else None
    elif name in KINDS:
        kind, value = name, part.get(name)
        if value is None:
            if not media.get(kind):
                told = f"a part {{'type': {kind!r}}}, but no medium for it under {kind!r} or '{kind}s'"
                raise DataError(f"{place}: {told}")
            return {"type": kind, kind: media[kind].pop(0)}
    else:
        return part
    if name not in KINDS and not isinstance(value, str):
        raise DataError(f"{place}: a part of type {name!r} without its {'data' if name == 'input_audio' else 'url'}")
    own.add(kind)
    return {"type": kind, kind: value}
