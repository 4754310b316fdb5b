"""The parts of the HTTP app without a server: access, requests and their errors, completions, metrics, page, schema."""

import asyncio
import base64
import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_engine import MODELS, FakeEngine

from finetune.common.errors import DataError
from finetune.recipe.schema import Limits
from finetune.serving.engine.contract import AnswerPiece, Busy, Stats, TimedOut, Token
from finetune.serving.http import app as app_module
from finetune.serving.http import completion as completion_module
from finetune.serving.http import reader as reader_module
from finetune.serving.http.access import AccessControl
from finetune.serving.http.app import api_error
from finetune.serving.http.completion import ChatCompletion
from finetune.serving.http.metrics import SECONDS, RequestMetrics, ServerMetrics
from finetune.serving.http.page import page
from finetune.serving.http.protocol import ApiError, ChatRequest, HeadRequest, parse_request
from finetune.serving.http.reader import RequestReader
from finetune.serving.http.settings import ServerOptions

# ------------------------------------------------------------------ access


def refused(path: str = "/v1/models", key: str | None = None, origins: tuple[str, ...] = (), **headers: str) -> Any:
    """(status, message) of a refusal; None where there is access."""
    control = AccessControl(lambda *_: None, key, origins)
    error = control.refusal(path, {name.encode(): value.encode() for name, value in headers.items()})
    return None if error is None else (error.status, error.message)


def test_why_access_is_refused_is_named():
    assert refused(host="localhost") is None
    served = "without an API key only localhost, 127.0.0.1, ::1 are served, not "
    assert refused(host="a" * 101) == (403, served + repr("a" * 100))
    assert refused() == (403, served + "''")
    assert refused(host="localhost", origin="http://localhost") is None
    assert refused(host="localhost", origin="b" * 101) == (
        403,
        f"pages of {'b' * 100!r} may not use this server; `origins` can allow it",
    )
    assert refused(host="localhost", origin="https://a.example", origins=("https://a.example",)) is None
    missing = (401, "send the server's key: Authorization: Bearer KEY")
    for sent in ("", "key", "bearer", "Bearer other", "Basic key", "Bearer key key"):
        assert refused(key="key", authorization=sent) == missing, sent
    assert refused(key="key") == missing and refused(key="key", host="localhost") == missing
    assert refused(key="key", authorization="BEARER  key ") is None
    assert refused("/", key="key") is None and refused("/health", key="key") is None and refused("/health/", key="key")


def called(app: Any, scope: dict[str, Any]) -> list[dict[str, Any]]:
    """What an ASGI app sends."""
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, None, send))
    return sent


def test_what_is_no_request_passes_and_the_first_of_equal_headers_counts():
    passed = []

    async def inner(*call: Any) -> None:
        passed.append(call[0])

    control = AccessControl(inner, "key")
    right, wrong = (b"authorization", b"Bearer key"), (b"authorization", b"Bearer other")
    lifespan = {"type": "lifespan"}
    assert called(control, lifespan) == [] and passed == [lifespan]
    assert called(control, {"type": "http", "path": "/v1/models", "headers": [right, wrong]}) == []
    assert len(passed) == 2
    start, body = called(control, {"type": "http", "path": "/v1/models", "headers": [wrong, right]})
    assert start["status"] == 401 and dict(start["headers"])[b"www-authenticate"] == b"Bearer" and len(passed) == 2
    error = {"message": "send the server's key: Authorization: Bearer KEY", "type": "authentication_error"}
    assert json.loads(body["body"]) == {"error": {**error, "param": None, "code": "invalid_api_key"}}


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "status, kind, headers",
    [
        (400, "invalid_request_error", {}),
        (401, "authentication_error", {"WWW-Authenticate": "Bearer", "Connection": "close"}),
        (403, "permission_error", {"Connection": "close"}),
        (404, "not_found_error", {}),
        (408, "invalid_request_error", {"Connection": "close"}),
        (413, "invalid_request_error", {"Connection": "close"}),
        (429, "rate_limit_error", {}),
        (499, "invalid_request_error", {}),
        (500, "server_error", {}),
        (503, "server_error", {}),
    ],
)
def test_errors_have_openai_s_types(status, kind, headers):
    error = ApiError(status, "what is wrong", param="n", code="why")
    assert error.headers == headers and str(error) == "what is wrong"
    assert error.content() == {"error": {"message": "what is wrong", "type": kind, "param": "n", "code": "why"}}
    assert ApiError(status, "", retry_after=7).headers == {"Retry-After": "7", **headers}


def test_what_the_client_did_not_cause_has_no_details(tmp_path):
    def seen(error: BaseException, **options: Any) -> tuple[Any, ...]:
        found = api_error(error, **options)
        return found.status, found.message, found.code, found.headers

    reader = RequestReader(MODELS, ServerOptions(), tmp_path)
    assert seen(RuntimeError("secret")) == (500, "the server failed; see its log", None, {})
    assert seen(DataError("at /home")) == (500, "the server failed; see its log", None, {})
    assert seen(DataError("too long"), reader=reader) == (400, "too long", None, {})
    busy = "too many requests are waiting; try again in"
    assert seen(Busy(2.2)) == (429, f"{busy} 2 s", "busy", {"Retry-After": "3"})
    assert seen(Busy(0.0)) == (429, f"{busy} 0 s", "busy", {"Retry-After": "1"})
    assert seen(TimedOut("no end")) == (504, "no end", "timeout", {})
    assert seen(TimedOut()) == (504, "the answer took too long", "timeout", {})
    memory = "out of memory: send fewer or smaller media, or shorter text"
    assert seen(MemoryError("at 0x5")) == (503, memory, None, {"Retry-After": "5"})
    not_found = app_module.HTTPException(405, "Method Not Allowed", {"Allow": "GET"})
    assert seen(not_found) == (405, "Method Not Allowed; the endpoints are under /v1", None, {"Allow": "GET"})
    assert seen(app_module.HTTPException(404, "Not Found"))[3] == {}
    already = ApiError(418, "x")
    assert api_error(already, reader) is already


def test_labels_and_numbers_of_answers():
    label, score = app_module._label_entry, app_module._score_entry
    probabilities = {"bad": 0.25, "good": 0.75}
    entry = {"probs": [0.25, 0.75], "num_classes": 2, "probabilities": probabilities}
    assert label(app_module.Answer("", probabilities)) == {"label": "good", **entry}
    assert label(app_module.Answer("bad", probabilities)) == {"label": "bad", **entry}
    for number, shown in ((None, None), (float("inf"), None), (0.0, 0.0), (-2.5, -2.5)):
        assert score(app_module.Answer(number=number)) == {"object": "score", "score": shown}


# ------------------------------------------------------------------ requests


def parsed(kind: type, max_characters: int = 1000, **content: Any) -> Any:
    return parse_request(kind, json.dumps(content).encode(), max_characters)


def error_of(call: Any, *arguments: Any, **options: Any) -> tuple[int, str, str | None, str | None]:
    with pytest.raises(ApiError) as caught:
        call(*arguments, **options)
    return caught.value.status, caught.value.message, caught.value.param, caught.value.code


def test_unsupported_fields_are_refused_unless_they_change_nothing():
    turn = {"messages": [{"role": "user", "content": "a"}]}
    harmless = {"tools": [], "stop_token_ids": [], "logit_bias": {}, "tool_choice": "auto", "modalities": ["text"]}
    harmless |= {"min_p": 0, "best_of": 1, "top_k": -1, "echo": False, "add_generation_prompt": True, "audio": None}
    assert parsed(ChatRequest, **turn, **harmless).model_extra == harmless
    harmful = {"guided_json": {}, "functions": [1], "chat_template": "x", "bad_words": ["a"], "function_call": "f"}
    harmful |= {"chat_template_kwargs": {"a": 1}, "modalities": ["audio"], "min_tokens": 1, "length_penalty": 0}
    harmful |= {"use_beam_search": True, "add_generation_prompt": False, "top_k": 1, "structured_outputs": {}}
    for name, value in harmful.items():
        found = error_of(parsed, ChatRequest, **turn, **{name: value})
        assert found == (400, f"{name}: not supported here; leave it out", name, "unsupported_parameter")


def test_the_field_of_a_wrong_value_is_named():
    image = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}]
    found = error_of(parsed, ChatRequest, messages=image)
    param = "messages[0].content[1].image_url.url"
    assert found == (400, f"{param}: Field required", param, None)
    assert error_of(parse_request, ChatRequest, b"[]", 10)[1:3] == ("Input should be an object", None)
    assert error_of(parsed, HeadRequest, input=[])[2] == "input"
    assert error_of(parsed, ChatRequest, messages=[{"role": "user", "content": [{"type": "text"}]}])[2] == (
        "messages[0].content[0].text"
    )


@pytest.mark.parametrize("mark", ["[", "{", ","])
def test_the_marks_of_a_body_are_counted_before_it_is_parsed(mark):
    message = "more than 100,005 commas and brackets (`max_characters`)"
    assert error_of(parse_request, ChatRequest, mark.encode() * 100_006, 5)[:2] == (413, message)
    assert error_of(parse_request, ChatRequest, mark.encode() * 100_005, 5)[0] == 400


@pytest.fixture
def read(tmp_path):
    """chat(..., options={}) of a reader that answers the model 'shelf' as FakeEngine's."""

    def chat(*content: Any, options: dict[str, Any] | None = None, **fields: Any) -> Any:
        read.reader = RequestReader(MODELS, ServerOptions(**(options or {})), tmp_path)
        body = {"model": "shelf", "messages": [{"role": "user", "content": [*content] or "a"}]} | fields
        return read.reader.chat(json.dumps(body).encode())[1]

    read = SimpleNamespace(chat=chat, folder=tmp_path, reader=None)
    return read


def data(content: bytes, kind: str = "image") -> dict[str, Any]:
    uri = f"data:x/y;base64,{base64.b64encode(content).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": uri}}


def test_a_chat_becomes_a_request_for_each_answer(read):
    (plain,) = read.chat()
    assert (plain.model, plain.max_new_tokens, plain.temperature, plain.top_p, plain.seed) == (
        "shelf",
        256,
        0.0,
        1.0,
        None,
    )
    assert (plain.stop, plain.logprobs, plain.schema, plain.strength, plain.timeout_seconds) == (
        (),
        None,
        None,
        None,
        120,
    )
    fields = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "n": 2, "stop": ["x", "", "y"], "logprobs": True}
    one, two = read.chat(**fields, top_logprobs=4, strength={"a": 0.5}, max_tokens=9, options={"timeout_seconds": 7})
    assert (one.temperature, one.top_p, one.seed, one.stop, one.logprobs) == (0.5, 0.9, 3, ("x", "y"), 4)
    assert (one.strength, one.max_new_tokens, one.timeout_seconds) == ({"a": 0.5}, 9, 7)
    assert (two.seed, two.messages) == (4, one.messages)
    assert read.chat(max_tokens=9, max_completion_tokens=5)[0].max_new_tokens == 5
    assert read.chat(options={"max_new_tokens": 20})[0].max_new_tokens == 20
    assert read.chat(options={"new_tokens": 30})[0].max_new_tokens == 30
    assert read.chat(logprobs=True)[0].logprobs == 0 and read.chat(logprobs=False)[0].logprobs is None


@pytest.mark.parametrize(
    "fields, options, param, problem",
    [
        ({"max_tokens": 2049}, {}, "max_tokens", "2,049; at most 2,048 here"),
        ({"n": 9}, {}, "n", "9; at most 8 here"),
        ({"stop": ["a", "b"]}, {"max_stops": 1}, "stop", "2; at most 1 here"),
        ({"stop": ["abc", "abc"]}, {"max_characters": 5}, "stop", "6 characters; at most 5 are accepted"),
        ({"top_logprobs": 1}, {}, "top_logprobs", "requires logprobs: true"),
        ({"top_logprobs": 1, "logprobs": False}, {}, "top_logprobs", "requires logprobs: true"),
        ({"response_format": {"type": "json_schema"}}, {}, "response_format.json_schema", "is missing"),
    ],
)
def test_bounds_of_a_chat_are_named(fields, options, param, problem, read):
    assert error_of(read.chat, options=options, **fields) == (400, f"{param}: {problem}", param, None)


def test_values_at_their_bounds_pass(read):
    assert read.chat(max_tokens=2048)[0].max_new_tokens == 2048 and len(read.chat(n=8)) == 8
    assert read.chat(stop=["ab", "cd"], options={"max_stops": 2, "max_characters": 4})
    turns = [
        {"role": "system", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert read.chat(messages=turns, options={"max_messages": 3})
    assert read.chat(data(b"1" * 20), data(b"3"), options={"max_media": 2, "max_bytes": 20})


def test_bounds_of_messages_are_named(read):
    turn = {"role": "user", "content": "ab"}
    found = error_of(read.chat, messages=[turn] * 3, options={"max_messages": 2})
    assert found == (400, "messages: 3; at most 2 are accepted", "messages", None)
    found = error_of(read.chat, messages=[turn] * 3, options={"max_characters": 5})
    assert found == (400, "messages: 6 characters; at most 5 are accepted", "messages", None)
    found = error_of(read.chat, messages=[turn, turn | {"role": "assistant"}])
    assert found == (400, "messages: the last is of 'assistant'; end on the user's turn", "messages", None)
    found = error_of(read.chat, data(b"1"), data(b"2"), options={"max_media": 1})
    assert found == (400, "messages: 2 media; at most 1 in one request", "messages", None)
    found = error_of(read.chat, messages=[{"role": "developer", "content": ["x", data(b"1")][1:]}, turn])
    assert found[1:3] == (
        "messages[0].content[0]: media are for the user's turns, not the developer's",
        "messages[0].content[0]",
    )
    roles = [message.role for message in read.chat(messages=[turn | {"role": "developer"}, turn])[0].messages]
    assert roles == ["system", "user"]


def test_media_become_files_in_their_places(read):
    png = b"\x89PNG and more"
    (request,) = read.chat(
        {"type": "text", "text": "a"}, data(png), data(b"xy", "video"), {"type": "text", "text": "b"}
    )
    before, image, video, after = request.messages[0].content
    assert (before, image.kind, video.kind, after) == ("a", "image", "video", "b")
    assert (image.path, video.path) == (read.folder / "0.png", read.folder / "1.bin")
    assert (image.path.read_bytes(), video.path.read_bytes()) == (png, b"xy")
    error = read.reader.api_error(DataError(f"{image.path}: no; {read.folder}/x: at most 5 (`media.max_bytes`)"))
    assert error.message == "messages[0].content[1]: no; x: at most 5 (`max_bytes`)" and error.status == 400
    for sent in (
        base64.b64encode(b"RIFF....WAVE").decode(),
        f"DATA:audio/x;base64,{base64.b64encode(b'RIFF....WAVE').decode()}",
    ):
        (request,) = read.chat({"type": "input_audio", "input_audio": {"data": sent}})
        (sound,) = request.messages[0].content
        assert sound.kind == "audio" and sound.path.name == "0.wav" and sound.path.read_bytes() == b"RIFF....WAVE"


def test_what_is_wrong_with_a_medium_is_named(read):
    def wrong(*content: Any, **more: Any) -> tuple[Any, ...]:
        return error_of(read.chat, {"type": "text", "text": "a"}, *content, **more)

    field = "messages[0].content[1]"
    bounded = {"options": {"max_bytes": 20}}
    assert wrong(data(bytes(21)), **bounded) == (
        413,
        f"{field}: a medium of 21 bytes; 1 to 20 (`max_bytes`)",
        field,
        None,
    )
    assert wrong(data(b""), **bounded) == (400, f"{field}: a medium of 0 bytes; 1 to 20 (`max_bytes`)", field, None)
    assert wrong(data(b"1"), model="写字")[1] == f"{field}: '写字' takes text only, not image"
    audio_alone = {"one": SimpleNamespace(media=("audio", "video"), tasks={}, context=None)}
    reader = RequestReader(audio_alone, ServerOptions(), read.folder)
    body = {"messages": [{"role": "user", "content": [data(b"1")]}]}
    assert error_of(reader.chat, json.dumps(body).encode())[1] == (
        "messages[0].content[0]: 'one' takes audio, video, not image"
    )

    def url(address: str) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": address}}

    paths = "write a data URI, data:TYPE;base64,...; paths are not accepted"
    for address in ("/etc/passwd", "file:///a", "ftp://a.example/a", "xhttp://a", ""):
        assert wrong(url(address)) == (400, f"{field}: {paths}", field, None)
    downloads = "this server downloads no media; send a data URI"
    for address in ("http://a.example/a", "HTTPS://a.example/a"):
        assert wrong(url(address)) == (400, f"{field}: {downloads}", field, None)
    longest = "data:," + "%61" * 18  # 60 characters: 3 times 20
    (request,) = read.chat(url(longest), **bounded)
    assert request.messages[0].content[0].path.read_bytes() == b"a" * 18
    assert wrong(url(f"{longest}a"), **bounded) == (413, f"{field}: more than 20 bytes (`max_bytes`)", field, None)


def test_media_are_downloaded_within_the_server_s_limits(read, monkeypatch):
    calls = []

    def content_at(*arguments: Any, **options: Any) -> bytes:
        calls.append((arguments, options))
        return b"GIF8"

    monkeypatch.setattr(reader_module, "content_at", content_at)
    address = "https://a.example/x"
    options = {"hosts": ("a.example",), "max_bytes": 50, "timeout_seconds": 9}
    (request,) = read.chat({"type": "image_url", "image_url": {"url": address}}, options=options)
    assert request.messages[0].content[0].path.name == "0.gif"
    expected = (address, ("a.example",), "messages[0].content[0]", 50)
    assert calls == [(expected, {"private": False, "seconds": 9})]


def heads(output: str = "labels", options: dict[str, Any] | None = None, **body: Any) -> Any:
    reader = RequestReader(MODELS, ServerOptions(**(options or {})), Path("."))
    return reader.heads(json.dumps(body).encode(), output)


def test_a_head_is_asked_each_text_or_one_conversation():
    asked = heads(model="shelf", input=["one", "two"])
    assert (asked.model, asked.task) == ("shelf", "mood")
    assert [[(turn.role, turn.content) for turn in one] for one in asked.conversations] == [
        [("user", ("one",))],
        [("user", ("two",))],
    ]
    asked = heads("score", model="shelf", task="stars", messages=[{"role": "user", "content": "a"}])
    assert asked.task == "stars" and len(asked.conversations) == 1


@pytest.mark.parametrize(
    "output, body, status, message, param, code",
    [
        ("labels", {"model": "shelf"}, 400, "write either messages or input", "input", None),
        (
            "labels",
            {"model": "shelf", "input": "a", "messages": [{"role": "user", "content": "a"}]},
            *(400, "write either messages or input", "input", None),
        ),
        ("labels", {"model": "shelf", "input": ["a"] * 3}, 400, "input: 3 texts; at most 2", "input", None),
        (
            "score",
            {"model": "shelf", "input": "a" * 6},
            400,
            "input: 6 characters; at most 5 are accepted",
            "input",
            None,
        ),
        ("labels", {"input": "a"}, 404, "model: name one; served are shelf, 写字", "model", "model_not_found"),
        (
            "labels",
            {"model": "m" * 101, "input": "a"},
            *(404, f"model: there is no {'m' * 100!r}; served are shelf, 写字", "model", "model_not_found"),
        ),
        (
            "labels",
            {"model": "shelf", "input": "a", "task": "stars"},
            *(400, "task: those of 'shelf' that answer by labels: mood", "task", None),
        ),
        (
            "score",
            {"model": "shelf", "input": "a", "task": "words"},
            *(400, "task: those of 'shelf' that answer by a number: stars", "task", None),
        ),
        (
            "score",
            {"model": "写字", "input": "a"},
            *(
                400,
                "task: those of '写字' that answer by a number: none; '写字' answers in words, at /v1/chat/completions",
                "task",
                None,
            ),
        ),
    ],
)
def test_what_a_head_is_not_asked(output, body, status, message, param, code):
    options = {"max_inputs": 2, "max_characters": 5}
    assert error_of(heads, output, options, **body) == (status, message, param, code)


def test_a_single_model_needs_no_name_and_one_of_several_tasks_does():
    label = MODELS["shelf"].tasks["mood"]
    one = {"one": SimpleNamespace(media=(), tasks={"a": label, "b": label}, context=None)}
    reader = RequestReader(one, ServerOptions(), Path("."))
    assert reader.heads(b'{"input": "x", "task": "b"}', "labels").task == "b"
    found = error_of(reader.heads, b'{"input": "x"}', "labels")
    assert found == (400, "task: those of 'one' that answer by labels: a, b", "task", None)


# ------------------------------------------------------------------ completions


class Stream:
    """Pieces or an error, one after the other."""

    def __init__(self, *items: Any, tokens: tuple[int, int, int] = (10, 2, 4)) -> None:
        self.items, self.cancelled = items, 0
        self.prompt_tokens, self.completion_tokens, self.cached_tokens = tokens

    def cancel(self) -> None:
        self.cancelled += 1

    async def __aiter__(self) -> Any:
        for item in self.items:
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, float):
                await asyncio.sleep(item)
            else:
                yield item


def completed(streams: list[Any], read_it: Any, seconds: float = 5.0, **fields: Any) -> Any:
    """What `read_it` gives for a completion of these streams."""
    waiting = iter(streams)

    def submit(request: Any) -> Any:
        one = next(waiting)
        if isinstance(one, BaseException):
            raise one
        return one

    async def run() -> Any:
        request = ChatRequest(messages=[{"role": "user", "content": "a"}], **fields)
        requests = [SimpleNamespace(model="shelf")] * len(streams)
        completion = ChatCompletion(SimpleNamespace(submit=submit), request, requests, seconds)
        await completion.start()
        try:
            return await read_it(completion), completion
        finally:
            completion.close()

    return asyncio.run(run())


async def whole(completion: ChatCompletion) -> Any:
    return await completion.content()


async def events(completion: ChatCompletion) -> list[Any]:
    found = [event async for event in completion.events(lambda error: ApiError(418, str(error)))]
    assert all(event.startswith("data: ") and event.endswith("\n\n") for event in found)
    return [event[6:-2] if event == "data: [DONE]\n\n" else json.loads(event[6:]) for event in found]


def test_answers_are_put_together_by_their_numbers(monkeypatch):
    monkeypatch.setattr(completion_module, "now", lambda: 1234)
    token = Token("b", b"\xe7", float("-inf"), (("c", b"c", -0.5),))
    streams = [
        Stream(0.02, AnswerPiece("late "), AnswerPiece("红", (token,), "length")),
        Stream(AnswerPiece("b", (token, token), "stop"), tokens=(10, 5, 8)),
    ]
    content, completion = completed(streams, whole, logprobs=True)
    assert completion.ended and re.fullmatch("chatcmpl-[0-9a-f]{32}", content.pop("id"))
    entry = {"token": "b", "logprob": -9999.0, "bytes": [0xE7]}
    entry |= {"top_logprobs": [{"token": "c", "logprob": -0.5, "bytes": [99]}]}

    def choice(index: int, text: str, tokens: int, reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        logprobs = {"content": [entry] * tokens, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    usage = {"prompt_tokens": 10, "completion_tokens": 7, "total_tokens": 17}
    assert content == {
        "created": 1234,
        "model": "shelf",
        "object": "chat.completion",
        "choices": [choice(0, "late 红", 1, "length"), choice(1, "b", 2, "stop")],
        "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 8}},
    }


@pytest.mark.parametrize("usage", [False, True])
def test_events_of_a_stream(usage):
    pieces = [
        AnswerPiece("红 "),
        AnswerPiece(""),
        AnswerPiece("", (Token("", b"x", -1.0),)),
        AnswerPiece("", (), "stop"),
    ]
    found, completion = completed([Stream(*pieces)], events, stream_options={"include_usage": usage})
    assert completion.ended and found.pop() == "[DONE]"
    if usage:
        last = found.pop()
        assert last["choices"] == [] and last["usage"]["total_tokens"] == 12
        assert all(event.pop("usage") is None for event in found)
    head = {key: found[0][key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    choices = [event.pop("choices") for event in found]
    assert found == [head] * 4
    assert choices == [
        [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        for delta, reason in (
            ({"role": "assistant", "content": ""}, None),
            ({"content": "红 "}, None),
            ({}, None),
            ({}, "stop"),
        )
    ]


def test_logprobs_of_events():
    token = Token("b", b"b", -0.25)
    found, _ = completed([Stream(AnswerPiece("b", (token,), "stop"))], events, logprobs=True)
    entry = {"token": "b", "logprob": -0.25, "bytes": [98], "top_logprobs": []}
    assert [event["choices"][0]["logprobs"] for event in found[:-1]] == [None, {"content": [entry], "refusal": None}]


def test_pieces_of_several_answers_come_as_they_arrive():
    slow = Stream(0.1, AnswerPiece("a"), 0.1, AnswerPiece("b", (), "stop"))
    quick = Stream(AnswerPiece("c"), AnswerPiece("d", (), "stop"))
    choices = [event["choices"][0] for event in completed([slow, quick], events)[0][2:-1]]
    assert [(one["index"], one["delta"]["content"]) for one in choices] == [(1, "c"), (1, "d"), (0, "a"), (0, "b")]


def test_text_of_events_is_readable():
    async def raw(completion: ChatCompletion) -> str:
        return "".join([event async for event in completion.events(None)])

    assert '"content": "红"' in completed([Stream(AnswerPiece("红", (), "stop"))], raw)[0]


@pytest.mark.parametrize("error", [DataError("a"), Busy(1), TimedOut("c"), MemoryError("d")])
def test_an_error_is_the_last_event(error):
    stream = Stream(AnswerPiece("a"), error)
    found, completion = completed([stream], events)
    assert found[-1]["error"]["message"] == str(error) and len(found) == 3
    assert completion.ended and stream.cancelled == 1


def test_other_errors_are_not_hidden():
    with pytest.raises(RuntimeError):
        completed([Stream(AnswerPiece("a"), RuntimeError())], events)


def test_an_engine_that_hangs_is_given_up():
    stream = Stream(AnswerPiece("a"), 30.0)
    with pytest.raises(TimedOut, match=r"^no complete answer after 0 s$"):
        completed([stream], whole, seconds=0.05)
    assert stream.cancelled == 1
    with pytest.raises(TimedOut, match=r"^no complete answer after 1 s$"):
        completed([Stream(30.0)], whole, seconds=0.6)


@pytest.mark.parametrize("error", [Busy(1), DataError("a")])
def test_where_one_answer_is_refused_none_goes_on(error):
    first = Stream(AnswerPiece("a", (), "stop"))
    with pytest.raises(type(error)):
        completed([first, error], whole)
    assert first.cancelled == 1


def test_a_completion_that_is_closed_early_has_not_ended():
    async def first(completion: ChatCompletion) -> bool:
        return completion.ended

    stream = Stream(AnswerPiece("a"), 30.0)
    ended, completion = completed([stream], first)
    assert not ended and not completion.ended and stream.cancelled == 1


# ------------------------------------------------------------------ metrics, page, schema, options


def values(metrics: ServerMetrics) -> dict[str, float]:
    lines = metrics.text().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs if "_created" not in name}


def test_metrics_count_what_was_answered():
    metrics = ServerMetrics(lambda: Stats({"hits": 3.0}, {"running": 2.0}))
    metrics.count_tokens("shelf", [Stream(tokens=(10, 2, 4)), Stream(tokens=(10, 5, 8))])
    metrics.count_tokens("shelf", [Stream(tokens=(1, 1, 1))])
    metrics.stopped.labels("shelf").inc()
    metrics.first_seconds.labels("shelf").observe(0.3)
    found = values(metrics)
    for name, value in {"prompt": 11, "cached": 5, "completion": 8}.items():
        assert found[f'finetune_{name}_tokens_total{{model="shelf"}}'] == value
    assert found['finetune_stopped_total{model="shelf"}'] == 1
    assert found["finetune_engine_hits_total"] == 3 and found["finetune_engine_running"] == 2
    buckets = [found[f'finetune_first_token_seconds_bucket{{le="{float(le)}",model="shelf"}}'] for le in SECONDS]
    assert buckets == [float(le >= 0.3) for le in SECONDS]
    lines = [line for line in metrics.text().decode().splitlines() if line.startswith("# HELP")]
    described = dict(line.removeprefix("# HELP finetune_").split(" ", 1) for line in lines if "_created" not in line)
    assert described == {
        "requests_total": "Responses by path and HTTP status.",
        "request_seconds": "From a request's arrival to the end of its response, s.",
        "first_token_seconds": "From a request's arrival to the first text of its answer, s.",
        "prompt_tokens_total": "Prompt tokens, media included.",
        "cached_tokens_total": "Prompt tokens found in the prefix cache.",
        "completion_tokens_total": "Generated tokens.",
        "stopped_total": "Requests cancelled by their client.",
        "engine_hits_total": "Of the engine, since its start.",
        "engine_running": "Of the engine, now.",
    }


def test_requests_are_timed_and_counted_by_path_and_status(monkeypatch):
    clock = iter([1.0, 3.0, 10.0, 10.25, 20.0, 24.0])
    monkeypatch.setattr("finetune.serving.http.metrics.perf_counter", lambda: next(clock))
    metrics = ServerMetrics(Stats)

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/fails":
            raise RuntimeError
        await send({"type": "http.response.start", "status": 201})
        await send({"type": "http.response.body"})

    counted = RequestMetrics(inner, metrics, ["/known", "/fails"])
    assert [message["type"] for message in called(counted, {"type": "http", "path": "/known"})] == [
        "http.response.start",
        "http.response.body",
    ]
    called(counted, {"type": "http", "path": "/unknown/1"})
    with pytest.raises(RuntimeError):
        called(counted, {"type": "http", "path": "/fails"})
    called(RequestMetrics(lambda *_: asyncio.sleep(0), metrics, []), {"type": "lifespan"})
    found = values(metrics)
    for path, status, seconds in (("/known", 201, 2.0), ("other", 201, 0.25), ("/fails", 500, 4.0)):
        assert found[f'finetune_requests_total{{path="{path}",status="{status}"}}'] == 1
        assert found[f'finetune_request_seconds_sum{{path="{path}"}}'] == seconds
    assert sum(value for name, value in found.items() if name.startswith("finetune_requests_total")) == 3


def test_the_page_runs_its_own_script_and_nothing_else():
    page.cache_clear()
    html, headers = page()
    rules = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    for tag in ("script", "style"):
        contents = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in contents]
        assert hashes and rules.pop(f"{tag}-src") == " ".join(f"'sha256-{one}'" for one in hashes)
    none = dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'")
    media = dict.fromkeys(("img-src", "media-src"), "data: blob:")
    assert rules == {**none, **media, "connect-src": "'self'"}
    assert {name: value for name, value in headers.items() if name != "Content-Security-Policy"} == {
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Permissions-Policy": "microphone=(self)",
        "Cache-Control": "no-cache",
    }


def test_the_schema_describes_the_endpoints(tmp_path):
    app = app_module.build_app(FakeEngine(), ServerOptions(), tmp_path)
    (route,) = [one for one in app.routes if one.path == "/openapi.json"]
    described = json.loads(asyncio.run(route.endpoint()).body)
    from finetune.common.version import VERSION

    assert described["info"] == {"title": "finetune", "version": VERSION} and described["openapi"].startswith("3.1")
    for path, kind in (("chat/completions", "ChatRequest"), ("classify", "HeadRequest"), ("score", "HeadRequest")):
        schema = {"$ref": f"#/components/schemas/{kind}"}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        assert described["paths"][f"/v1/{path}"].keys() == {"post"}
        assert described["paths"][f"/v1/{path}"]["post"]["requestBody"] == body
    assert described["paths"]["/v1/models"].keys() == {"get"}
    references = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(described)))
    assert references <= described["components"]["schemas"].keys()
    assert "messages" in described["components"]["schemas"]["ChatRequest"]["required"]


def test_the_tighter_limit_holds():
    options = ServerOptions(max_bytes=5, max_pixels=50, max_seconds=5.0, max_frames=5)
    limits = options.media_limits(
        Limits(max_bytes=7, max_pixels=7, max_seconds=7.0, max_frames=3, shrink_to_pixels=2048)
    )
    assert limits == Limits(max_bytes=5, max_pixels=7, max_seconds=5.0, max_frames=3, shrink_to_pixels=2048)
    assert ServerOptions(hosts=" a, ,b ").hosts == ("a", "b") and ServerOptions(hosts=("a",)).hosts == ("a",)
