"""From a request's JSON to what the engine takes. Its media become files of a folder that goes with the request."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.common.errors import DataError
from finetune.data.fetch import content_at
from finetune.data.media_store import data_uri_content, suffix_of
from finetune.data.sample import Medium, Message
from finetune.serving.engine.contract import Request
from finetune.serving.http.protocol import (
    ApiError,
    AudioAddressPart,
    AudioPart,
    ChatRequest,
    HeadRequest,
    ImagePart,
    Part,
    TextPart,
    Turn,
    VideoPart,
    parsed,
)
from finetune.serving.http.settings import Options

ROLES = {"developer": "system"}
Models = Mapping[str, Mapping[str, Any]]


class Intake:
    """One request's media, in a folder of their own under `folder`. `close` removes them."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options = options
        self.path = Path(tempfile.mkdtemp(dir=folder))
        self.where: dict[str, str] = {}  # path -> its place in the request

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def told(self, error: Exception) -> str:
        """An error's text with places in the request instead of paths, and the server's own names of bounds."""
        text = str(error)
        for path, where in self.where.items():
            text = text.replace(path, where)
        return text.replace(f"{self.path}/", "").replace("`media.", "`")

    def messages(self, turns: Sequence[Turn], model: str, kinds: Sequence[str]) -> tuple[Message, ...]:
        """Raises ApiError, and DataError for media that can't be had."""
        options = self.options
        if len(turns) > options.max_messages:
            raise ApiError(
                400, f"messages: {len(turns):,}; at most {options.max_messages:,} are read", param="messages"
            )
        if turns[-1].role != "user":
            raise ApiError(
                400, f"messages: the last is of {turns[-1].role!r}; end on the user's turn", param="messages"
            )
        self._count(turns)
        found = []
        for number, turn in enumerate(turns):
            content: list[str | Medium] = []
            for place, part in enumerate(turn.content):
                where = f"messages[{number}].content[{place}]"
                if isinstance(part, TextPart):
                    content.append(part.text)
                    continue
                if turn.role != "user":
                    raise ApiError(400, f"{where}: media are for the user's turns, not the {turn.role}'s", param=where)
                content.append(self._medium(part, where, model, kinds))
            found.append(Message(ROLES.get(turn.role, turn.role), tuple(content)))
        return tuple(found)

    def _count(self, turns: Sequence[Turn]) -> None:
        options = self.options
        parts = [part for turn in turns for part in turn.content]
        media = sum(not isinstance(part, TextPart) for part in parts)
        if media > options.max_media:
            raise ApiError(
                400, f"messages: {media:,} media; at most {options.max_media:,} in one request", param="messages"
            )
        check_characters([part.text for part in parts if isinstance(part, TextPart)], options, "messages")

    def _medium(self, part: Part, where: str, model: str, kinds: Sequence[str]) -> Medium:
        kind, address = _kind_and_address(part)
        if kind not in kinds:
            raise ApiError(400, f"{where}: {model!r} takes {', '.join(kinds) or 'text only'}, not {kind}", param=where)
        content = self._content(address, where)
        if not 0 < len(content) <= self.options.max_bytes:
            raise ApiError(
                413 if content else 400,
                f"{where}: a medium of {len(content):,} bytes; 1 to {self.options.max_bytes:,} (`max_bytes`)",
                param=where,
            )
        path = self.path / f"{len(self.where)}{suffix_of(content)}"
        path.write_bytes(content)
        self.where[str(path)] = where
        return Medium(kind, path)

    def _content(self, address: str, where: str) -> bytes:
        options = self.options
        scheme = address[:8].lower()
        if scheme.startswith("data:"):
            if len(address) > options.max_bytes * 3:  # percent-encoded it may be thrice as long as what it says
                raise ApiError(413, f"{where}: more than {options.max_bytes:,} bytes (`max_bytes`)", param=where)
            return data_uri_content(address, where)
        if not scheme.startswith(("http://", "https://")):
            raise ApiError(400, f"{where}: write a data URI, data:TYPE;base64,...; no paths are read", param=where)
        if not options.hosts:
            raise ApiError(
                400, f"{where}: media by address are off on this server; send the medium as a data URI", param=where
            )
        return content_at(
            address, options.hosts, where, options.max_bytes, private=False, seconds=options.timeout_seconds
        )


def _kind_and_address(part: Part) -> tuple[str, str]:
    if isinstance(part, ImagePart):
        return "image", part.image_url.url
    if isinstance(part, VideoPart):
        return "video", part.video_url.url
    if isinstance(part, AudioAddressPart):
        return "audio", part.audio_url.url
    assert isinstance(part, AudioPart)
    data = part.input_audio.data
    return "audio", data if data[:5].lower() == "data:" else f"data:audio/x;base64,{data}"


def check_characters(texts: Sequence[str], options: Options, param: str) -> None:
    """Raises ApiError for more text than is read."""
    count = sum(map(len, texts))
    if count > options.max_characters:
        raise ApiError(400, f"{param}: {count:,} characters; at most {options.max_characters:,} are read", param=param)


def served(models: Models, name: str | None) -> str:
    """The model that is asked: named, or the only one. Raises ApiError."""
    if name is None and len(models) == 1:
        return next(iter(models))
    if name is None or name not in models:
        said = "name one" if name is None else f"there is no {name[:100]!r}"
        raise ApiError(404, f"model: {said}; served are {', '.join(models)}", param="model", code="model_not_found")
    return name


def chat_requests(asked: ChatRequest, models: Models, options: Options, intake: Intake) -> list[Request]:
    """As many as there are answers asked for. Raises ApiError, DataError."""
    model = served(models, asked.model)
    new_tokens = asked.max_completion_tokens or asked.max_tokens or min(options.new_tokens, options.max_new_tokens)
    answers, stop = asked.n or 1, tuple(filter(None, asked.stop or ()))
    bounds = {
        "max_tokens": (new_tokens, options.max_new_tokens),
        "n": (answers, options.max_answers),
        "stop": (len(stop), options.max_stops),
    }
    for param, (value, most) in bounds.items():
        if value > most:
            raise ApiError(400, f"{param}: {value:,}; at most {most:,} here", param=param)
    check_characters(stop, options, "stop")
    if asked.top_logprobs and not asked.logprobs:
        raise ApiError(400, "top_logprobs: goes with logprobs: true", param="top_logprobs")
    messages = intake.messages(asked.messages, model, models[model]["media"])
    return [
        Request(
            model=model,
            messages=messages,
            max_new_tokens=new_tokens,
            temperature=asked.temperature or 0.0,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=None if asked.seed is None else asked.seed + number,
            stop=stop,
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            schema=_schema(asked),
            strength=asked.strength,
            timeout_seconds=options.timeout_seconds,
        )
        for number in range(answers)
    ]


def _schema(asked: ChatRequest) -> Mapping[str, Any] | None:
    wanted = asked.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        raise ApiError(400, "response_format.json_schema: is missing", param="response_format.json_schema")
    return wanted.json_schema.schema_


def head_questions(
    asked: HeadRequest, models: Models, options: Options, intake: Intake, heads: str
) -> tuple[str, str, list[tuple[Message, ...]]]:
    """(model, task, conversations) of a request to classify or score. `heads`: "labels" or "score". Raises ApiError,
    DataError.
    """
    model = served(models, asked.model)
    tasks = models[model]["tasks"]
    fit = [name for name, task in tasks.items() if (task["labels"] if heads == "labels" else task["head"] == "score")]
    if asked.task not in (fit if asked.task or len(fit) != 1 else (None,)):
        kind = "labels" if heads == "labels" else "a number"
        told = ", ".join(fit) or f"none; {model!r} answers in words, at /v1/chat/completions"
        raise ApiError(400, f"task: those of {model!r} that answer by {kind}: {told}", param="task")
    task = asked.task or fit[0]
    if (asked.messages is None) == (asked.input is None):
        raise ApiError(400, "write either messages or input", param="input")
    if asked.messages is not None:
        return model, task, [intake.messages(asked.messages, model, models[model]["media"])]
    texts = asked.input or []
    if len(texts) > options.max_inputs:
        raise ApiError(400, f"input: {len(texts):,} texts; at most {options.max_inputs:,}", param="input")
    check_characters(texts, options, "input")
    return model, task, [(Message("user", (text,)),) for text in texts]


def read_chat(body: bytes, models: Models, options: Options, intake: Intake) -> tuple[ChatRequest, list[Request]]:
    """Raises ApiError for what can't be asked."""
    asked = parsed(ChatRequest, body, options.max_characters)
    try:
        return asked, chat_requests(asked, models, options, intake)
    except DataError as error:
        raise ApiError(400, intake.told(error)) from None


def read_heads(
    body: bytes, models: Models, options: Options, intake: Intake, heads: str
) -> tuple[str, str, list[tuple[Message, ...]]]:
    """Raises ApiError for what can't be asked."""
    asked = parsed(HeadRequest, body, options.max_characters)
    try:
        return head_questions(asked, models, options, intake, heads)
    except DataError as error:
        raise ApiError(400, intake.told(error)) from None
