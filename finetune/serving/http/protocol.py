"""OpenAI's requests as far as they are supported, its errors, and parts of its responses."""

import math
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from finetune.serving.engine.answer_stream import AnswerStream
from finetune.serving.engine.contract import Token
from finetune.serving.http.settings import MOST_IN_A_LIST

JsonObject = dict[str, object]

# OpenAI's error types by HTTP status.
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
BODY_UNREAD = (401, 403, 408, 413)  # sent before the body has been read: the connection can't be used again
EXTRA_MARKS = 100_000  # commas and brackets of a request besides those in its texts
LOWEST_LOGPROB = -9999.0  # nats; JSON has no infinity

# Unsupported fields that would change the answer, and their values that don't.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    name: (None, *harmless)
    for names, *harmless in (
        ("audio web_search_options structured_outputs chat_template",),
        ("guided_json guided_regex guided_choice guided_grammar",),
        ("tools functions stop_token_ids bad_words", []),
        ("logit_bias chat_template_kwargs", {}),
        ("tool_choice function_call", "none", "auto"),
        ("modalities", [], ["text"]),
        ("presence_penalty frequency_penalty min_p min_tokens", 0),
        ("repetition_penalty length_penalty best_of", 1),
        ("top_k", 0, -1),
        ("use_beam_search ignore_eos continue_final_message echo", False),
        ("add_generation_prompt", True),
    )
    for name in str(names).split()
}


class ApiError(Exception):
    """An error response of OpenAI's form."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {"Retry-After": str(retry_after)} if retry_after else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
        if status in BODY_UNREAD:
            self.headers["Connection"] = "close"

    def content(self) -> JsonObject:
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        error_type = ERROR_TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": error_type, "param": self.param, "code": self.code}}


def invalid(param: str, problem: str, status: int = 400) -> ApiError:
    """The error of one field."""
    return ApiError(status, f"{param}: {problem}", param=param)


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Address(BaseModel):
    url: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: Address


class VideoPart(BaseModel):
    type: Literal["video_url"]
    video_url: Address


class AudioAddressPart(BaseModel):
    type: Literal["audio_url"]
    audio_url: Address


class Recording(BaseModel):
    """`data`: base64; its format is detected."""

    data: str


class AudioPart(BaseModel):
    type: Literal["input_audio"]
    input_audio: Recording


TAGS = ("text", "image_url", "video_url", "input_audio", "audio_url")
MediaPart = ImagePart | VideoPart | AudioPart | AudioAddressPart
Part = Annotated[TextPart | MediaPart, Field(discriminator="type")]
Short = Field(max_length=MOST_IN_A_LIST, fail_fast=True)
TextList = Annotated[list[str], Short]
Texts = Annotated[
    TextList | None,
    BeforeValidator(lambda v: [v] if isinstance(v, str) else v, json_schema_input_type=str | TextList | None),
]


def _parts(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Turn(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], Short, BeforeValidator(_parts, json_schema_input_type=str | list[Part])]


class StreamOptions(BaseModel):
    include_usage: bool = False


class NamedSchema(BaseModel):
    schema_: JsonObject = Field(alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class ApiRequest(BaseModel):
    """Unknown fields are stored, to be checked against UNSUPPORTED."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None


class ChatRequest(ApiRequest):
    messages: Annotated[list[Turn], Short] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Texts = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    strength: Annotated[float, Field(ge=0)] | dict[str, float] | None = None


class HeadRequest(ApiRequest):
    """Either `messages`, or `input` of one or more texts. `task`: required if several tasks have such a head."""

    task: str | None = None
    messages: Annotated[list[Turn], Short] | None = Field(None, min_length=1)
    input: Texts = Field(None, min_length=1)


ApiRequestT = TypeVar("ApiRequestT", bound=ApiRequest)


def parse_request(kind: type[ApiRequestT], body: bytes, max_characters: int) -> ApiRequestT:
    """A request from its JSON. Raises ApiError, which names the field."""
    # Every JSON value costs one of these marks; parsing many millions of values would delay all other requests.
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > max_characters + EXTRA_MARKS:
        raise ApiError(413, f"more than {max_characters + EXTRA_MARKS:,} commas and brackets (`max_characters`)")
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = field_name(first["loc"])
        raise (invalid(param, first["msg"]) if param else ApiError(400, first["msg"])) from None
    for name, harmless in UNSUPPORTED.items():
        if (request.model_extra or {}).get(name) not in harmless:
            raise ApiError(400, f"{name}: not supported here; leave it out", param=name, code="unsupported_parameter")
    return request


def field_name(path: Sequence[str | int]) -> str:
    """('messages', 0, 'content', 1, 'image_url', 'image_url', 'url') -> 'messages[0].content[1].image_url.url'."""
    name = ""
    for place, key in enumerate(path):
        if isinstance(key, int):
            name += f"[{key}]"
        elif not (key in TAGS and place and isinstance(path[place - 1], int)):  # pydantic's name of the union's member
            name += f".{key}"
    return name.lstrip(".")


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def usage_of(streams: Sequence[AnswerStream]) -> JsonObject:
    """Tokens of all answers to one prompt, which counts once."""
    prompt, completion = streams[0].prompt_tokens, sum(stream.completion_tokens for stream in streams)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": max(stream.cached_tokens for stream in streams)},
    }


def logprobs_of(tokens: Sequence[Token]) -> JsonObject:
    def entry(text: str, raw: bytes, nats: float) -> JsonObject:
        return {"token": text, "logprob": nats if math.isfinite(nats) else LOWEST_LOGPROB, "bytes": list(raw)}

    return {
        "content": [
            entry(token.text, token.raw, token.logprob)
            | {"top_logprobs": [entry(*other) for other in token.alternatives]}
            for token in tokens
        ],
        "refusal": None,
    }
