"""From a request's JSON to the engine's requests; the media become files in a folder of this request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.common.errors import DataError
from finetune.data.fetch import content_at
from finetune.data.media_store import data_uri_content, suffix_of
from finetune.data.sample import Medium, Message
from finetune.serving.engine.contract import JsonSchema, ModelInfo, Request, TaskInfo
from finetune.serving.http.protocol import (
    ApiError,
    AudioPart,
    ChatRequest,
    HeadRequest,
    MediaPart,
    TextPart,
    Turn,
    invalid,
    parse_request,
)
from finetune.serving.http.settings import ServerOptions

ROLES = {"developer": "system"}
HeadOutput = Literal["labels", "score"]


@dataclass(frozen=True)
class HeadQuestions:
    """Conversations to be answered by one task's head."""

    model: str
    task: str
    conversations: list[tuple[Message, ...]]


class RequestReader:
    """Reads one request, whose media become files in `folder`."""

    def __init__(self, models: Mapping[str, ModelInfo], options: ServerOptions, folder: Path) -> None:
        self.models, self.options, self.folder = models, options, folder
        self._fields: dict[str, str] = {}  # of each file's path, its field in the request

    def api_error(self, error: DataError) -> ApiError:
        """The error with fields of the request in place of paths, and limits by the server's names."""
        text = str(error)
        for path, field in self._fields.items():
            text = text.replace(path, field)
        return ApiError(400, text.replace(f"{self.folder}/", "").replace("`media.", "`"))

    def chat(self, body: bytes) -> tuple[ChatRequest, list[Request]]:
        """One request to the engine for each answer. Raises ApiError, DataError."""
        options = self.options
        chat = parse_request(ChatRequest, body, options.max_characters)
        model = self._model(chat.model)
        new_tokens = chat.max_completion_tokens or chat.max_tokens or min(options.new_tokens, options.max_new_tokens)
        answers, stop = chat.n or 1, tuple(filter(None, chat.stop or ()))
        bounds = {
            "max_tokens": (new_tokens, options.max_new_tokens),
            "n": (answers, options.max_answers),
            "stop": (len(stop), options.max_stops),
        }
        for param, (value, most) in bounds.items():
            if value > most:
                raise invalid(param, f"{value:,}; at most {most:,} here")
        self._check_characters(stop, "stop")
        if chat.top_logprobs and not chat.logprobs:
            raise invalid("top_logprobs", "requires logprobs: true")
        messages = self._messages(chat.messages, model)
        requests = [
            Request(
                model=model,
                messages=messages,
                max_new_tokens=new_tokens,
                temperature=chat.temperature or 0.0,
                top_p=1.0 if chat.top_p is None else chat.top_p,
                seed=None if chat.seed is None else chat.seed + number,
                stop=stop,
                logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
                schema=_schema(chat),
                strength=chat.strength,
                timeout_seconds=options.timeout_seconds,
            )
            for number in range(answers)
        ]
        return chat, requests

    def heads(self, body: bytes, output: HeadOutput) -> HeadQuestions:
        """A request to classify or to score. Raises ApiError, DataError."""
        request = parse_request(HeadRequest, body, self.options.max_characters)
        model = self._model(request.model)
        task = self._task(model, request.task, output)
        if (request.messages is None) == (request.input is None):
            raise ApiError(400, "write either messages or input", param="input")
        if request.messages is not None:
            return HeadQuestions(model, task, [self._messages(request.messages, model)])
        texts = request.input or []
        if len(texts) > self.options.max_inputs:
            raise invalid("input", f"{len(texts):,} texts; at most {self.options.max_inputs:,}")
        self._check_characters(texts, "input")
        return HeadQuestions(model, task, [(Message("user", (text,)),) for text in texts])

    def _model(self, name: str | None) -> str:
        """The model by its name, or the only one."""
        if name is None and len(self.models) == 1:
            return next(iter(self.models))
        if name is None or name not in self.models:
            problem = "name one" if name is None else f"there is no {name[:100]!r}"
            message = f"model: {problem}; served are {', '.join(self.models)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    def _task(self, model: str, name: str | None, output: HeadOutput) -> str:
        """The task by its name, or the only one with such an output."""

        def fits(task: TaskInfo) -> bool:
            return bool(task.labels) if output == "labels" else task.head == "score"

        names = [task for task, info in self.models[model].tasks.items() if fits(info)]
        if name in names:
            return name
        if name is not None or len(names) != 1:
            kind = "labels" if output == "labels" else "a number"
            choices = ", ".join(names) or f"none; {model!r} answers in words, at /v1/chat/completions"
            raise invalid("task", f"those of {model!r} that answer by {kind}: {choices}")
        return names[0]

    def _messages(self, turns: Sequence[Turn], model: str) -> tuple[Message, ...]:
        options = self.options
        if len(turns) > options.max_messages:
            raise invalid("messages", f"{len(turns):,}; at most {options.max_messages:,} are accepted")
        if turns[-1].role != "user":
            raise invalid("messages", f"the last is of {turns[-1].role!r}; end on the user's turn")
        parts = [part for turn in turns for part in turn.content]
        media = sum(not isinstance(part, TextPart) for part in parts)
        if media > options.max_media:
            raise invalid("messages", f"{media:,} media; at most {options.max_media:,} in one request")
        self._check_characters([part.text for part in parts if isinstance(part, TextPart)], "messages")
        messages = []
        for number, turn in enumerate(turns):
            content: list[str | Medium] = []
            for place, part in enumerate(turn.content):
                field = f"messages[{number}].content[{place}]"
                if isinstance(part, TextPart):
                    content.append(part.text)
                    continue
                if turn.role != "user":
                    raise invalid(field, f"media are for the user's turns, not the {turn.role}'s")
                content.append(self._medium(part, field, model))
            messages.append(Message(ROLES.get(turn.role, turn.role), tuple(content)))
        return tuple(messages)

    def _check_characters(self, texts: Sequence[str], param: str) -> None:
        count, most = sum(map(len, texts)), self.options.max_characters
        if count > most:
            raise invalid(param, f"{count:,} characters; at most {most:,} are accepted")

    def _medium(self, part: MediaPart, field: str, model: str) -> Medium:
        kind, address = _kind_and_address(part)
        kinds, most = self.models[model].media, self.options.max_bytes
        if kind not in kinds:
            raise invalid(field, f"{model!r} takes {', '.join(kinds) or 'text only'}, not {kind}")
        content = self._content(address, field)
        if not 0 < len(content) <= most:
            problem = f"a medium of {len(content):,} bytes; 1 to {most:,} (`max_bytes`)"
            raise invalid(field, problem, 413 if content else 400)
        path = self.folder / f"{len(self._fields)}{suffix_of(content)}"
        path.write_bytes(content)
        self._fields[str(path)] = field
        return Medium(kind, path)

    def _content(self, address: str, field: str) -> bytes:
        options = self.options
        scheme = address[:8].lower()
        if scheme.startswith("data:"):
            if len(address) > options.max_bytes * 3:  # percent-encoding triples the length at most
                raise invalid(field, f"more than {options.max_bytes:,} bytes (`max_bytes`)", 413)
            return data_uri_content(address, field)
        if not scheme.startswith(("http://", "https://")):
            raise invalid(field, "write a data URI, data:TYPE;base64,...; paths are not accepted")
        if not options.hosts:
            raise invalid(field, "this server downloads no media; send a data URI")
        return content_at(
            address, options.hosts, field, options.max_bytes, private=False, seconds=options.timeout_seconds
        )


def _kind_and_address(part: MediaPart) -> tuple[str, str]:
    if not isinstance(part, AudioPart):
        return part.type.removesuffix("_url"), getattr(part, part.type).url
    data = part.input_audio.data
    return "audio", data if data[:5].lower() == "data:" else f"data:audio/x;base64,{data}"


def _schema(chat: ChatRequest) -> JsonSchema | None:
    response_format = chat.response_format
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return {"type": "object"}
    if response_format.json_schema is None:
        raise invalid("response_format.json_schema", "is missing")
    return response_format.json_schema.schema_
