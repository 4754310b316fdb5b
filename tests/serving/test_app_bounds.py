"""Access, limits, and cancelled requests."""

import base64
import io
import json
import logging
import re
import socket
import threading
import time

import av
import numpy as np
import pytest
import soundfile
from fake_engine import FakeEngine, call, served
from tiny import tiny_picture

from finetune.data import fetch
from finetune.serving.engine.contract import Busy

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"


@pytest.fixture
def engine():
    return FakeEngine()


def picture_uri(size=(40, 30), kind="PNG"):
    file = io.BytesIO()
    tiny_picture(size=size).save(file, kind)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def clip(frames=6):
    """An mp4 of a few grey frames."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 32, 32
        for number in range(frames):
            picture = np.full((32, 32, 3), 40 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def chat_body(*parts, **more):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"model": "shelf", "messages": [{"role": "user", "content": content}]} | more


def image(url):
    return {"type": "image_url", "image_url": {"url": url}}


def message_of(response):
    assert response[2]["error"].keys() == {"message", "type", "param", "code"}, response
    return response[2]["error"]["message"]


# ------------------------------------------------------------------ heads


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with served(FakeEngine(), tmp_path_factory.mktemp("media")) as (address, _):
        yield address


def test_labels_with_their_probabilities(plain):
    status, _, response = call(plain, "/v1/classify", {"model": "shelf", "input": ["one", "two"]})
    assert status == 200 and response["task"] == "mood"
    assert response["object"] == "list" and response["id"].startswith("classify-")
    expected = {"label": "good", "probs": [0.25, 0.75], "num_classes": 2, "probabilities": {"bad": 0.25, "good": 0.75}}
    assert response["data"] == [{"index": number, **expected} for number in (0, 1)]
    body = chat_body(image(picture_uri()), "what mood?", task="mood")
    assert call(plain, "/v1/classify", body)[2]["data"] == [{"index": 0, **expected}]


def test_numbers(plain):
    response = call(plain, "/v1/score", {"model": "shelf", "input": "seven c", "task": "stars"})[2]
    assert response["data"] == [{"index": 0, "object": "score", "score": 7.0}]
    assert call(plain, "/v1/score", {"model": "shelf", "input": "nan"})[2]["data"][0]["score"] is None


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/classify", {"model": "shelf", "input": "a", "task": "stars"}, "answer by labels: mood"),
        ("/v1/score", {"model": "shelf", "input": "a", "task": "mood"}, "answer by a number: stars"),
        ("/v1/classify", {"model": "写字", "input": "a"}, "answer by labels: none"),
        ("/v1/classify", {"model": "shelf"}, "either messages or input"),
        ("/v1/classify", {"model": "shelf", "input": []}, "at least 1"),
        ("/v1/classify", {"model": "shelf", "input": ["a"] * 33}, "at most 32"),
        ("/v1/classify", {"model": "shelf", "input": "unreadable"}, "can't be read"),
        ("/v1/score", {"model": "other", "input": "a"}, "there is no 'other'"),
        ("/v1/score", {"input": "a"}, "name one; served are shelf"),
    ],
)
def test_invalid_requests_to_heads(plain, path, body, message):
    response = call(plain, path, body)
    assert message in message_of(response)
    assert response[0] == (404 if "served" in message or "no 'other'" in message else 400)


# ------------------------------------------------------------------ bodies and media


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"a"', b"null", b"\xff\xfe", b"[" * 100_000, b'{"messages": "a"}'])
def test_bodies_that_are_no_request(plain, body):
    response = call(plain, CHAT, body or b" ")
    assert response[0] == 400 and message_of(response)


def test_a_lone_surrogate_is_invalid_json(plain):
    response = call(plain, CHAT, b'{"model": "shelf", "messages": [{"role": "user", "content": "\\ud800"}]}')
    assert response[0] == 400 and "Invalid JSON" in message_of(response)


def test_paths_and_invalid_addresses_are_refused(plain, tmp_path):
    secret = tmp_path / "secret.png"
    tiny_picture().save(secret)
    for url in (str(secret), f"file://{secret}", f"FILE://{secret}", "ftp://a.example/a.png", "//a.example/a.png", ""):
        assert "write a data URI" in message_of(call(plain, CHAT, chat_body(image(url))))
    response = call(plain, CHAT, chat_body(image("https://a.example/a.png")))
    assert response[0] == 400 and "downloads no media" in message_of(response)
    assert response[2]["error"]["param"] == "messages[0].content[0]"
    for url in ("data:image/png;base64,%%%", "data:image/png;base64,???", "data:"):
        assert "no data URI" in message_of(call(plain, CHAT, chat_body(image(url))))
    assert "1 to 33,554,432" in message_of(call(plain, CHAT, chat_body(image("data:image/png;base64,"))))


def test_errors_of_media_name_their_field_and_no_path(plain):
    uri = f"data:image/png;base64,{base64.b64encode(b'<svg/>').decode()}"
    message = message_of(call(plain, CHAT, chat_body("what?", image(picture_uri()), image(uri))))
    assert message.startswith("messages[0].content[2]: ") and "/" not in message and "finetune" not in message


def test_media_of_a_kind_that_the_model_does_not_take(plain):
    message = message_of(call(plain, CHAT, chat_body(image(picture_uri())) | {"model": "写字"}))
    assert message == "messages[0].content[0]: '写字' takes text only, not image"
    earlier = [{"role": "system", "content": [image(picture_uri())]}, {"role": "user", "content": "a"}]
    assert "the user's turns" in message_of(call(plain, CHAT, {"model": "shelf", "messages": earlier}))


def test_a_video_arrives(plain):
    uri = f"data:video/mp4;base64,{base64.b64encode(clip()).decode()}"
    response = call(plain, CHAT, chat_body({"type": "video_url", "video_url": {"url": uri}}, "what?"))
    assert response[2]["choices"][0]["message"]["content"] == "2 frames what? "


BOUNDED = {"max_request_bytes": 20_000, "max_bytes": 2_000, "max_media": 2, "max_messages": 3, "max_characters": 50}


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    with served(FakeEngine(), tmp_path_factory.mktemp("media"), **BOUNDED) as (address, _):
        yield address


def test_each_limit_is_named(bounded):
    small = picture_uri((4, 4))
    assert call(bounded, CHAT, chat_body(image(small), image(small)))[0] == 200
    for body, status, message in (
        (chat_body(*[image(small)] * 3), 400, "3 media; at most 2"),
        (chat_body(image(picture_uri((40, 30), "BMP"))), 413, "(`max_bytes`)"),
        (chat_body("x" * 51), 400, "51 characters; at most 50"),
        ({"model": "shelf", "messages": [{"role": "user", "content": "a"}] * 4}, 400, "4; at most 3"),
        (chat_body("a", stop=["x" * 51]), 400, "51 characters"),
    ):
        response = call(bounded, CHAT, body)
        assert (response[0], message in message_of(response)) == (status, True), response


@pytest.mark.parametrize(
    ("one", "count", "status"),
    [
        (b'{"role": "user", "content": ""}', 1_000_000, 413),
        (b'{"role": "user", "content": ""}', 50_000, 400),
        (b"{}", 140_000, 400),
        (b"[]", 145_000, 400),
    ],
)
def test_a_body_of_many_values_is_refused_quickly(plain, one, count, status):
    body = b'{"model": "shelf", "messages": [' + b",".join([one] * count) + b"]}"
    begin = time.monotonic()
    response = call(plain, CHAT, body)
    assert response[0] == status and time.monotonic() - begin < 2
    assert len(message_of(response)) < 200
    more = call(plain, "/v1/classify", {"model": "shelf", "input": ["a"] * 10_001})
    assert more[0] == 400 and "at most 10000 items" in message_of(more)
    assert call(plain, CHAT, chat_body("," * 200_000))[0] == 200


def test_a_body_is_read_only_up_to_its_limit(bounded):
    assert call(bounded, CHAT, chat_body("x" * 30_000))[0] == 413
    with raw(bounded, f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n") as connection:
        sent = 0
        try:
            while sent < 50 * 2**20:
                connection.sendall(b"10000\r\n" + b" " * 2**16 + b"\r\n")
                sent += 2**16
        except OSError:
            pass  # the server has closed the connection
        assert sent < 50 * 2**20


def test_a_body_that_does_not_arrive(tmp_path):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{"
    with served(FakeEngine(), tmp_path, body_seconds=0.2) as (address, _), raw(address, head) as connection:
        assert b"408" in connection.recv(1000)


# ------------------------------------------------------------------ media by address


@pytest.fixture
def media_host(monkeypatch):
    """A server of one picture on loopback."""
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = base64.b64decode(picture_uri((9, 9)).partition(",")[2])
            moved = self.path.startswith("/moved?")
            self.send_response(302 if moved else 200)
            if moved:
                self.send_header("Location", self.path.partition("?")[2])
            self.send_header("Content-Length", str(0 if moved else len(body)))
            self.end_headers()
            self.wfile.write(b"" if moved else body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_media_are_downloaded_only_from_allowed_public_hosts(media_host, engine, tmp_path, monkeypatch):
    (tmp_path / "media").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here = f"http://127.0.0.1:{media_host}/a.png"
    with served(engine, tmp_path / "media", hosts=("127.0.0.1", "localhost")) as (address, _):
        message = message_of(call(address, CHAT, chat_body(image(here.replace("127.0.0.1", "localhost")))))
        assert message.endswith("leads into a private network") and "127.0.0.1" not in message and "::1" not in message
        assert "`hosts` doesn't name" in message_of(call(address, CHAT, chat_body(image("http://a.example/a.png"))))
        monkeypatch.setattr(fetch, "_check_public", lambda *_: None)
        assert call(address, CHAT, chat_body(image(here)))[2]["choices"][0]["message"]["content"].startswith("9x9 ")
        for target in (f"http://[::1]:{media_host}/a.png", "http://169.254.169.254/latest", "file:///etc/hostname"):
            moved = f"http://127.0.0.1:{media_host}/moved?{target}"
            assert message_of(call(address, CHAT, chat_body(image(moved))))
    assert len(engine.decoded) == 1 and not (tmp_path / "cache").exists()  # not cached


# ------------------------------------------------------------------ access


def test_without_a_key_only_this_machine_and_its_own_page_have_access(plain):
    port = plain.rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", "[::1]:80", "LOCALHOST"):
        assert call(plain, "/v1/models", Host=host)[0] == 200, host
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost@evil.example", "", "[::"):
        assert call(plain, "/v1/models", Host=host)[0] == 403, host
        assert call(plain, "/", Host=host)[0] == 403, host
    body = chat_body("a")
    for origin in ("http://evil.example", "null", f"https://localhost:{port}", "http://localhost"):
        assert call(plain, CHAT, body, Origin=origin, Host=f"localhost:{port}")[0] == 403, origin
    response = call(plain, CHAT, body, Origin=f"http://localhost:{port}", Host=f"localhost:{port}")
    assert response[0] == 200 and "access-control-allow-origin" not in response[1]


def test_pages_of_an_allowed_origin_have_access(tmp_path):
    site = "https://chat.example"
    with served(FakeEngine(), tmp_path, origins=(site,)) as (address, _):
        response = call(address, CHAT, chat_body("a"), Origin=site)
        assert response[0] == 200 and response[1]["access-control-allow-origin"] == site
        assert call(address, CHAT, chat_body("a"), Origin="https://other.example")[0] == 403


def test_a_key_is_required_except_for_the_page_and_health(tmp_path):
    with served(FakeEngine(), tmp_path, api_key="schlüssel", origins=("https://a.example",)) as (address, _):
        right = "Bearer schlüssel".encode().decode("latin-1")
        for path in ("/v1/models", "/metrics", "/v1/none", "/openapi.json", "/docs"):
            response = call(address, path)
            assert response[0] == 401 and response[1]["www-authenticate"] == "Bearer", path
        for wrong in ("", "schlüssel", "Bearer", "Bearer schlüsse", "Bearer schlüssel2", "Basic schlüssel"):
            given = wrong.encode().decode("latin-1")
            assert call(address, CHAT, chat_body("a"), Authorization=given)[0] == 401, wrong
        assert call(address, "/")[0] == call(address, "/health")[0] == 200
        for path in ("/v1/models", "/metrics"):
            assert call(address, path, Authorization=right, Host="models.example")[0] == 200
        assert call(address, CHAT, chat_body("a"), Authorization=right.replace("Bearer", "bearer"))[0] == 200


def test_the_key_is_checked_before_the_body_is_read(tmp_path):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n"
    with served(FakeEngine(), tmp_path, api_key="key") as (address, _), raw(address, head) as connection:
        assert b"401" in connection.recv(1000)


# ------------------------------------------------------------------ the rest


def test_other_addresses_and_methods(plain):
    assert call(plain, "/v1/none")[0] == 404 and "under /v1" in message_of(call(plain, "/v1/none"))
    assert call(plain, CHAT)[0] == 405
    described = call(plain, "/openapi.json")[2]
    assert described["paths"][CHAT]["post"]["requestBody"]["required"]
    named = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(described)))
    assert {"ChatRequest", "HeadRequest", "Turn"} <= named <= described["components"]["schemas"].keys()
    for path in ("/docs", "/redoc", "/../etc/hostname", "/static/a"):
        assert call(plain, path)[0] == 404


def test_internal_errors_give_no_details(tmp_path, caplog):
    engine = FakeEngine(fails_after=0, error=RuntimeError("secret at /home/someone"))
    caplog.set_level(logging.CRITICAL)
    with served(engine, tmp_path) as (address, _):
        response = call(address, CHAT, chat_body("a"))
        assert response[0] == 500 and message_of(response) == "the server failed; see its log"
    assert not list(tmp_path.iterdir())


def test_metrics(engine, tmp_path):
    with served(engine, tmp_path) as (address, _):
        call(address, CHAT, chat_body("a b"))
        call(address, CHAT, chat_body("a", stream=True))
        call(address, CHAT, chat_body(n=0))
        call(address, "/v1/unknown")
        status, headers, text = call(address, "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values[f'finetune_requests_total{{path="{CHAT}",status="200"}}'] == "2.0"
    assert values[f'finetune_requests_total{{path="{CHAT}",status="400"}}'] == "1.0"
    assert values['finetune_requests_total{path="other",status="404"}'] == "1.0"
    assert values['finetune_prompt_tokens_total{model="shelf"}'] == "20.0"
    assert values['finetune_cached_tokens_total{model="shelf"}'] == "8.0"
    assert values['finetune_completion_tokens_total{model="shelf"}'] == "3.0"
    assert values['finetune_first_token_seconds_count{model="shelf"}'] == "2.0"
    assert values["finetune_engine_requests_total"] == "2.0" and values["finetune_engine_running"] == "0.0"


def test_too_many_waiting_media_get_429(tmp_path):
    with served(FakeEngine(fails_after=0, error=Busy(2.4)), tmp_path) as (address, _):
        for more in ({}, {"stream": True}, {"n": 2}):
            response = call(address, CHAT, chat_body("a", **more))
            assert response[0] == 429 and response[1]["retry-after"] == "3"


def test_health_reports_a_failed_engine(engine, tmp_path):
    with served(engine, tmp_path) as (address, _):
        assert call(address, "/health")[0] == 200
        engine.alive = False
        assert call(address, "/health")[::2] == (503, {"status": "failed"})


def test_new_requests_are_refused_while_draining(engine, tmp_path):
    with served(engine, tmp_path) as (address, app):
        assert call(address, "/health")[0] == 200
        app.state.server.draining = True
        assert call(address, "/health")[:1] == (503,)
        for path in (CHAT, "/v1/classify", "/v1/score"):
            response = call(address, path, chat_body("a"))
            assert response[0] == 503 and response[1]["retry-after"] == "5", path
    assert not engine.requests


def raw(address, head):
    """A socket with the beginning of a request."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=5)
    connection.sendall(head.encode())
    return connection


def becomes_true(condition, seconds=3.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("stream", [True, False])
def test_disconnecting_cancels_the_answer(stream, tmp_path):
    engine = FakeEngine(step_seconds=0.02)
    body = json.dumps(chat_body(image(picture_uri()), "word " * 1000, stream=stream, max_tokens=2000))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with served(engine, tmp_path) as (address, _):
        with raw(address, head + body) as connection:
            if stream:
                received = b""
                while received.count(b"data: ") < 5:
                    received += connection.recv(1000)
            else:
                assert becomes_true(lambda: engine.streams and engine.streams[0].completion_tokens > 2)
            assert not engine.cancelled and list(tmp_path.iterdir())
        assert becomes_true(lambda: engine.cancelled == 1)
        written = engine.streams[0].completion_tokens
        assert written < 500 and becomes_true(lambda: not list(tmp_path.iterdir()))
        time.sleep(0.1)
        assert engine.streams[0].completion_tokens <= written + 1
        metrics = call(address, "/metrics")[2]
        assert 'finetune_stopped_total{model="shelf"} 1.0' in metrics
        assert f'path="{CHAT}",status="{200 if stream else 499}"}} 1.0' in metrics


def test_disconnecting_before_the_first_word_cancels_it_too(tmp_path):
    engine = FakeEngine(delay=30)
    body = json.dumps(chat_body("a", stream=True))
    with served(engine, tmp_path) as (address, _):
        with raw(address, f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}"):
            assert becomes_true(lambda: engine.streams)
        assert becomes_true(lambda: engine.cancelled == 1)


def test_a_hung_engine_gives_504(tmp_path, monkeypatch):
    from finetune.serving.http import app as module

    monkeypatch.setattr(module, "GRACE_SECONDS", 0.1)
    engine = FakeEngine(delay=30)
    with served(engine, tmp_path, timeout_seconds=0.1) as (address, _):
        response = call(address, CHAT, chat_body("a"))
        assert response[0] == 504 and engine.cancelled == 1


def test_the_format_of_sound_is_detected(plain):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(8_000, np.float32), 16_000, format="FLAC")
    data = base64.b64encode(file.getvalue()).decode()
    response = call(
        plain, CHAT, chat_body({"type": "input_audio", "input_audio": {"data": data, "format": "mp3"}}, "a")
    )
    assert response[2]["choices"][0]["message"]["content"] == "0.5s a "
