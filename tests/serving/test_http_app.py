"""The HTTP app called as ASGI servers do, and the connections of ours, without sockets."""

import asyncio
import base64
import json
import logging
import re
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from fake_engine import FakeEngine
from uvicorn import Config
from uvicorn.server import ServerState

from finetune.common.errors import DataError
from finetune.serving.engine.contract import Busy
from finetune.serving.http import app as module
from finetune.serving.http.connection import protocol_with_timeout
from finetune.serving.http.settings import ServerOptions

CHAT = "/v1/chat/completions"
JSON = "application/json"


class Server:
    """An app and its private folder. `leaves`: seconds after which a client disconnects."""

    def __init__(self, folder: Path, engine: FakeEngine | None = None, key: str | None = None, **options: Any) -> None:
        self.engine, self.folder = engine or FakeEngine(), folder
        self.app = module.build_app(self.engine, ServerOptions(**options), folder, key)
        self.files: list[int] = []  # in the folder, as each part of a response is sent

    def call(
        self,
        path: str,
        body: Any = None,
        *,
        method: str = "",
        leaves: float | None = None,
        stalls: bool = False,
        **headers: str,
    ) -> tuple[int, dict[str, str], Any]:
        """(status, headers, JSON or text). A body comes in parts of 50 bytes, and never ends if it `stalls`."""
        content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        parts = [content[begin : begin + 50] for begin in range(0, len(content), 50)] or [b""]
        self.sent = sent = []

        async def receive() -> dict[str, Any]:
            if parts:
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts) or stalls}
            await asyncio.sleep(30 if leaves is None else leaves)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            self.files.append(len(list(self.folder.iterdir())))
            sent.append(message)

        every = {"host": "localhost", **{name.replace("_", "-"): value for name, value in headers.items()}}
        scope = {
            "type": "http",
            "method": method or ("GET" if body is None else "POST"),
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in every.items()],
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }
        asyncio.run(self.app(scope, receive, send))
        start = sent[0]
        text = b"".join(message.get("body", b"") for message in sent[1:]).decode()
        found = {name.decode(): value.decode() for name, value in start["headers"]}
        return start["status"], found, json.loads(text) if found.get("content-type") == JSON else text


def chat(*content: Any, **more: Any) -> dict[str, Any]:
    return {"model": "shelf", "messages": [{"role": "user", "content": [*content] or "a b"}]} | more


PICTURE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(b'GIF8').decode()}"}}


@pytest.fixture
def server(tmp_path):
    return Server(tmp_path)


def test_pages_health_and_metrics(server):
    status, headers, html = server.call("/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8") and html.startswith("<!")
    assert headers["content-security-policy"].startswith("default-src 'none'; ")
    assert server.call("/health")[::2] == (200, {"status": "ok"})
    server.engine.alive = False
    assert server.call("/health")[::2] == (503, {"status": "failed"})
    server.app.state.server.draining = True
    assert server.call("/health")[::2] == (503, {"status": "draining"})
    status, headers, text = server.call("/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=")
    assert 'finetune_requests_total{path="/health",status="503"} 2.0' in text


def test_models(server, monkeypatch):
    tasks = {
        "mood": {"head": "label", "labels": ["bad", "good"], "prompt": ""},
        "stars": {"head": "score", "labels": None, "prompt": ""},
        "words": {"head": "language", "labels": None, "prompt": "What is this?"},
    }
    created = server.app.state.server.started
    every = {"object": "model", "created": created, "owned_by": "finetune"}
    shelf = every | {"id": "shelf", "max_model_len": 512, "media": ["image", "audio", "video"], "tasks": tasks}
    other = every | {"id": "写字", "max_model_len": None, "media": [], "tasks": {}}
    assert server.call("/v1/models")[::2] == (200, {"object": "list", "data": [shelf, other]})
    assert server.call("/v1/models/shelf")[::2] == (200, shelf)
    status, _, response = server.call("/v1/models/" + "m" * 101)
    assert status == 404 and response["error"] == {
        "message": f"there is no {'m' * 100!r}; served are shelf, 写字",
        "type": "not_found_error",
        "param": None,
        "code": "model_not_found",
    }


def test_an_answer_and_what_is_counted_of_it(server):
    status, _, response = server.call(CHAT, chat())
    assert status == 200 and response["choices"][0]["message"]["content"] == "a b "
    assert server.engine.cancelled == 0 and server.engine.requests[0].timeout_seconds == 120
    text = server.call("/metrics")[2]
    for line in ("prompt_tokens_total 10.0", "completion_tokens_total 2.0", "first_token_seconds_count 1.0"):
        name, value = line.split()
        assert f'finetune_{name}{{model="shelf"}} {value}' in text
    assert "finetune_stopped_total{" not in text
    (seconds,) = re.findall(r'first_token_seconds_sum\{model="shelf"\} (.*)', text)
    assert 0 < float(seconds) < 5


def test_a_stream_of_events(server):
    status, headers, text = server.call(CHAT, chat(stream=True))
    assert status == 200 and headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache" and headers["x-accel-buffering"] == "no"
    assert text.endswith("data: [DONE]\n\n") and text.count("data: ") == 4
    assert 'finetune_completion_tokens_total{model="shelf"} 2.0' in server.call("/metrics")[2]


@pytest.mark.parametrize("stream", [False, True])
def test_media_are_there_until_the_answer_is(stream, tmp_path):
    engine = FakeEngine()
    engine.describe = lambda medium: medium.path.read_bytes().decode()  # type: ignore[method-assign]
    server = Server(tmp_path, engine)
    assert "GIF8 " in json.dumps(server.call(CHAT, chat(PICTURE, stream=stream))[2])
    assert server.files[0] == stream and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error, status, message",
    [
        (DataError("no schema"), 400, "no schema"),
        (Busy(2.4), 429, "too many requests are waiting; try again in 2 s"),
        (MemoryError(), 503, "out of memory: send fewer or smaller media, or shorter text"),
    ],
)
def test_an_error_is_a_response_before_the_first_word_and_an_event_after_it(error, status, message, tmp_path):
    first = Server(tmp_path, FakeEngine(fails_after=0, error=error))
    for stream in (False, True):
        found = first.call(CHAT, chat(stream=stream))
        assert (found[0], found[2]["error"]["message"]) == (status, message)
    later = Server(tmp_path, FakeEngine(fails_after=1, error=error))
    found = later.call(CHAT, chat())
    assert (found[0], found[2]["error"]["message"]) == (status, message)
    found = later.call(CHAT, chat(stream=True))
    assert found[0] == 200 and json.loads(found[2].split("data: ")[-1])["error"]["message"] == message
    assert not list(tmp_path.iterdir())


def test_errors_name_fields_in_place_of_files(tmp_path):
    engine = FakeEngine()
    engine.describe = lambda medium: (_ for _ in ()).throw(DataError(f"{medium.path}: no picture"))  # type: ignore
    for stream in (False, True):
        found = Server(tmp_path, engine).call(CHAT, chat(PICTURE, stream=stream))
        assert (found[0], found[2]["error"]["message"]) == (400, "messages[0].content[0]: no picture")


def test_an_unforeseen_error_has_no_details(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    server = Server(tmp_path, FakeEngine(fails_after=0, error=RuntimeError("secret")))
    with pytest.raises(RuntimeError):  # for the server's log
        server.call(CHAT, chat())
    assert server.sent[0]["status"] == 500
    assert json.loads(server.sent[1]["body"])["error"]["message"] == "the server failed; see its log"
    assert f'finetune_requests_total{{path="{CHAT}",status="500"}} 1.0' in server.call("/metrics")[2]


def test_other_addresses_and_methods(server):
    for path, body, status, message in (
        ("/v1/none", None, 404, "Not Found; the endpoints are under /v1"),
        (CHAT, None, 405, "Method Not Allowed; the endpoints are under /v1"),
        ("/docs", None, 404, "Not Found; the endpoints are under /v1"),
        ("/redoc", None, 404, "Not Found; the endpoints are under /v1"),
    ):
        found = server.call(path, body)
        assert (found[0], found[2]["error"]["message"]) == (status, message)
    assert server.call("/openapi.json")[0] == 200


@pytest.mark.parametrize("leaves", [0.05, 0.0])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_answer(stream, leaves, tmp_path):
    engine = FakeEngine(step_seconds=0.01, delay=0.0 if leaves else 5.0)
    server = Server(tmp_path, engine)
    words = {"type": "text", "text": "word " * 1000}
    status, _, _ = server.call(CHAT, chat(words, stream=stream, max_tokens=2000), leaves=leaves)
    assert status == (200 if stream and leaves else 499)
    assert engine.cancelled == 1 and engine.streams[0].completion_tokens < 100 and not list(tmp_path.iterdir())
    text = server.call("/metrics")[2]
    assert 'finetune_stopped_total{model="shelf"} 1.0' in text
    assert f'path="{CHAT}",status="{status}"}} 1.0' in text


def test_a_client_of_heads_that_leaves_gets_no_answer(tmp_path):
    server = Server(tmp_path, FakeEngine(delay=5.0))
    assert server.call("/v1/classify", {"model": "shelf", "input": "a"}, leaves=0.0)[0] == 499


def test_a_hung_engine_is_given_up_after_the_grace(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.04)
    server = Server(tmp_path, FakeEngine(delay=5.0), timeout_seconds=0.02)
    found = server.call(CHAT, chat())
    assert (found[0], found[2]["error"]["message"]) == (504, "no complete answer after 0 s")
    assert server.engine.cancelled == 1


def test_heads(server, monkeypatch):
    monkeypatch.setattr(module, "now", lambda: 1234)
    status, _, response = server.call("/v1/classify", {"model": "shelf", "input": ["a", "b"]})
    assert status == 200 and re.fullmatch("classify-[0-9a-f]{32}", response.pop("id"))
    probabilities = {"bad": 0.25, "good": 0.75}
    entry = {"label": "good", "probs": [0.25, 0.75], "num_classes": 2, "probabilities": probabilities}
    every = {"object": "list", "created": 1234, "model": "shelf"}
    assert response == every | {"task": "mood", "data": [{"index": 0, **entry}, {"index": 1, **entry}]}
    status, _, response = server.call("/v1/score", {"model": "shelf", "input": "abc"})
    assert status == 200 and re.fullmatch("score-[0-9a-f]{32}", response.pop("id"))
    assert response == every | {"task": "stars", "data": [{"index": 0, "object": "score", "score": 3.0}]}
    status, _, response = server.call("/v1/classify", {"model": "shelf", "input": "unreadable"})
    assert (status, response["error"]["message"]) == (400, "can't be read")


def test_the_time_limit_reaches_the_engine(tmp_path):
    server, limits = Server(tmp_path, timeout_seconds=9.0), []
    ask = server.engine.ask

    async def noted(model: str, task: str, messages: Any, seconds: float) -> Any:
        limits.append(seconds)
        return await ask(model, task, messages, seconds)

    server.engine.ask = noted  # type: ignore[method-assign]
    assert server.call("/v1/score", {"model": "shelf", "input": "abc"})[0] == 200
    server.call(CHAT, chat())
    assert limits == [9.0] and server.engine.requests[0].timeout_seconds == 9.0


def test_bodies_are_bounded(tmp_path):
    body = json.dumps(chat()).encode()
    assert Server(tmp_path, max_request_bytes=len(body)).call(CHAT, body)[0] == 200
    status, headers, response = Server(tmp_path, max_request_bytes=len(body) - 1).call(CHAT, body)
    message = f"more than {len(body) - 1} bytes in one request (`max_request_bytes`)"
    assert (status, response["error"]["message"], headers["connection"]) == (413, message, "close")
    status, headers, response = Server(tmp_path, body_seconds=0.05).call(CHAT, body, stalls=True)
    message = "the body didn't arrive within 0.05 s"
    assert (status, response["error"]["message"], headers["connection"]) == (408, message, "close")
    large = chat({"type": "text", "text": "x" * 2000})
    status, _, response = Server(tmp_path, max_request_bytes=1000).call(CHAT, large)
    assert response["error"]["message"] == "more than 1,000 bytes in one request (`max_request_bytes`)"


def test_new_requests_are_refused_while_draining(server):
    server.app.state.server.draining = True
    for path in (CHAT, "/v1/classify", "/v1/score"):
        status, headers, response = server.call(path, chat())
        message = "the server is shutting down; send the request to another"
        assert (status, headers["retry-after"], response["error"]["message"]) == (503, "5", message)
    assert not server.engine.requests


def test_a_key_is_required(tmp_path):
    server = Server(tmp_path, key="key")
    assert server.call("/v1/models")[0] == 401
    assert server.call("/v1/models", authorization="Bearer key")[0] == 200
    assert (
        'finetune_requests_total{path="/v1/models",status="401"} 1.0'
        in (server.call("/metrics", authorization="Bearer key")[2])
    )


def test_allowed_origins(tmp_path):
    site = "https://chat.example"
    server = Server(tmp_path, origins=(site,), engine=FakeEngine(busy_from=0))
    status, headers, _ = server.call(CHAT, chat(), origin=site)
    assert status == 429 and headers["access-control-allow-origin"] == site
    assert headers["access-control-expose-headers"] == "Retry-After"
    assert server.call(CHAT, chat(), origin="https://other.example")[0] == 403
    for method, status in (("POST", 200), ("GET", 200), ("PUT", 400)):
        names = {"access_control_request_method": method, "access_control_request_headers": "authorization"}
        assert server.call(CHAT, method="OPTIONS", origin=site, **names)[0] == status
    plain = Server(tmp_path).call(CHAT, chat(), origin="http://localhost")
    assert plain[0] == 200 and "access-control-allow-origin" not in plain[1]


# ------------------------------------------------------------------ connections


@pytest.fixture
def connection():
    """(protocol, loop, transport, the timers that were set: (seconds, what they call, handle))."""
    loop, transport, timers = MagicMock(), MagicMock(), []

    def call_later(seconds: float, call: Any) -> Any:
        timers.append((seconds, call, MagicMock()))
        return timers[-1][2]

    loop.call_later = call_later
    loop.create_task = lambda work, **_: work.close() or MagicMock()
    protocol = protocol_with_timeout(7.0)(Config(lambda: None, log_config=None), ServerState(), {}, loop)
    protocol.connection_made(transport)
    return protocol, transport, timers


def test_a_connection_without_a_request_is_closed(connection):
    protocol, transport, timers = connection
    assert [timer[:2] for timer in timers] == [(7.0, transport.close)]
    for part in (b"GET / HT", b"TP/1.1\r\nHost: a\r\n"):  # headers in parts don't begin the time anew
        protocol.data_received(part)
    assert len(timers) == 1 and not timers[0][2].cancel.called
    protocol.data_received(b"\r\n")
    assert timers[0][2].cancel.call_count == 1 and len(timers) == 1
    protocol.update_timer()  # while it is answered there is no time limit
    assert len(timers) == 1
    protocol.cycle.response_complete = True
    protocol.update_timer()
    assert [timer[:2] for timer in timers] == [(7.0, transport.close)] * 2 and not timers[1][2].cancel.called
    protocol.connection_lost(None)
    assert timers[1][2].cancel.call_count == 1
    protocol.stop_timer()
    assert timers[1][2].cancel.call_count == 1


def test_a_client_that_reads_nothing_is_dropped(connection):
    protocol, transport, timers = connection
    for number in (1, 2):
        protocol.pause_writing()
        assert protocol.flow.write_paused and timers[number][:2] == (7.0, transport.abort)
        assert not timers[number][2].cancel.called
        protocol.resume_writing()
        assert timers[number][2].cancel.call_count == 1 and not protocol.flow.write_paused
    protocol.pause_writing()
    protocol.connection_lost(None)
    assert timers[3][2].cancel.call_count == timers[0][2].cancel.call_count == 1
    assert transport.close.called and protocol not in protocol.connections
