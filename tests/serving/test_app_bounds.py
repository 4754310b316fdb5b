"""Who may ask, how much, and what becomes of requests that nobody waits for."""

import base64
import io
import json
import logging
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


def asking(*parts, **more):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"model": "shelf", "messages": [{"role": "user", "content": content}]} | more


def image(url):
    return {"type": "image_url", "image_url": {"url": url}}


def message_of(reply):
    assert reply[2]["error"].keys() == {"message", "type", "param", "code"}, reply
    return reply[2]["error"]["message"]


# ------------------------------------------------------------------ heads


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with served(FakeEngine(), tmp_path_factory.mktemp("media")) as (address, _):
        yield address


def test_labels_with_their_probabilities(plain):
    status, _, said = call(plain, "/v1/classify", {"model": "shelf", "input": ["one", "two"]})
    assert status == 200 and said["task"] == "mood" and said["object"] == "list" and said["id"].startswith("classify-")
    expected = {"label": "good", "probs": [0.25, 0.75], "num_classes": 2, "probabilities": {"bad": 0.25, "good": 0.75}}
    assert said["data"] == [{"index": number, **expected} for number in (0, 1)]
    asked = asking(image(picture_uri()), "what mood?", task="mood")
    assert call(plain, "/v1/classify", asked)[2]["data"] == [{"index": 0, **expected}]


def test_numbers(plain):
    said = call(plain, "/v1/score", {"model": "shelf", "input": "seven c", "task": "stars"})[2]
    assert said["data"] == [{"index": 0, "object": "score", "score": 7.0}]
    assert call(plain, "/v1/score", {"model": "shelf", "input": "nan"})[2]["data"][0]["score"] is None


@pytest.mark.parametrize(
    ("path", "body", "said"),
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
def test_what_heads_can_not_be_asked(plain, path, body, said):
    reply = call(plain, path, body)
    assert said in message_of(reply) and reply[0] == (404 if "served" in said or "no 'other'" in said else 400)


# ------------------------------------------------------------------ what is read


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"a"', b"null", b"\xff\xfe", b"[" * 100_000, b'{"messages": "a"}'])
def test_what_is_no_request(plain, body):
    reply = call(plain, CHAT, body or b" ")
    assert reply[0] == 400 and message_of(reply)


def test_half_a_character(plain):
    reply = call(plain, CHAT, b'{"model": "shelf", "messages": [{"role": "user", "content": "\\ud800"}]}')
    assert reply[0] == 400 and "Invalid JSON" in message_of(reply)


def test_paths_and_addresses_that_are_not(plain, tmp_path):
    secret = tmp_path / "secret.png"
    tiny_picture().save(secret)
    for url in (str(secret), f"file://{secret}", f"FILE://{secret}", "ftp://a.example/a.png", "//a.example/a.png", ""):
        assert "write a data URI" in message_of(call(plain, CHAT, asking(image(url))))
    reply = call(plain, CHAT, asking(image("https://a.example/a.png")))
    assert reply[0] == 400 and "by address are off" in message_of(reply)
    assert reply[2]["error"]["param"] == "messages[0].content[0]"
    for url in ("data:image/png;base64,%%%", "data:image/png;base64,???", "data:"):
        assert "no data URI" in message_of(call(plain, CHAT, asking(image(url))))
    assert "1 to 33,554,432" in message_of(call(plain, CHAT, asking(image("data:image/png;base64,"))))


def test_errors_of_media_name_their_place_and_no_path(plain):
    uri = f"data:image/png;base64,{base64.b64encode(b'<svg/>').decode()}"
    said = message_of(call(plain, CHAT, asking("what?", image(picture_uri()), image(uri))))
    assert said.startswith("messages[0].content[2]: ") and "/" not in said and "finetune" not in said


def test_media_that_the_model_does_not_take(plain):
    said = message_of(call(plain, CHAT, asking(image(picture_uri())) | {"model": "写字"}))
    assert said == "messages[0].content[0]: '写字' takes text only, not image"
    earlier = [{"role": "system", "content": [image(picture_uri())]}, {"role": "user", "content": "a"}]
    assert "the user's turns" in message_of(call(plain, CHAT, {"model": "shelf", "messages": earlier}))


def test_a_video_arrives(plain):
    uri = f"data:video/mp4;base64,{base64.b64encode(clip()).decode()}"
    said = call(plain, CHAT, asking({"type": "video_url", "video_url": {"url": uri}}, "what?"))
    assert said[2]["choices"][0]["message"]["content"] == "2 frames what? "


BOUNDED = {"max_request_bytes": 20_000, "max_bytes": 2_000, "max_media": 2, "max_messages": 3, "max_characters": 50}


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    with served(FakeEngine(), tmp_path_factory.mktemp("media"), **BOUNDED) as (address, _):
        yield address


def test_each_bound_is_told(bounded):
    small = picture_uri((4, 4))
    assert call(bounded, CHAT, asking(image(small), image(small)))[0] == 200
    for body, status, said in (
        (asking(*[image(small)] * 3), 400, "3 media; at most 2"),
        (asking(image(picture_uri((40, 30), "BMP"))), 413, "(`max_bytes`)"),
        (asking("x" * 51), 400, "51 characters; at most 50"),
        ({"model": "shelf", "messages": [{"role": "user", "content": "a"}] * 4}, 400, "4; at most 3"),
        (asking("a", stop=["x" * 51]), 400, "51 characters"),
    ):
        reply = call(bounded, CHAT, body)
        assert (reply[0], said in message_of(reply)) == (status, True), reply


@pytest.mark.parametrize(
    ("one", "count", "status"),
    [
        (b'{"role": "user", "content": ""}', 1_000_000, 413),
        (b'{"role": "user", "content": ""}', 50_000, 400),
        (b"{}", 140_000, 400),
        (b"[]", 145_000, 400),
    ],
)
def test_a_body_of_many_values_holds_nobody_up(plain, one, count, status):
    body = b'{"model": "shelf", "messages": [' + b",".join([one] * count) + b"]}"
    begin = time.monotonic()
    reply = call(plain, CHAT, body)
    assert reply[0] == status and time.monotonic() - begin < 2
    assert len(message_of(reply)) < 200
    more = call(plain, "/v1/classify", {"model": "shelf", "input": ["a"] * 10_001})
    assert more[0] == 400 and "at most 10000 items" in message_of(more)
    assert call(plain, CHAT, asking("," * 200_000))[0] == 200


def test_a_body_is_read_no_further_than_it_may_be(bounded):
    assert call(bounded, CHAT, asking("x" * 30_000))[0] == 413
    with raw(bounded, f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n") as open_socket:
        sent = 0
        try:
            while sent < 50 * 2**20:
                open_socket.sendall(b"10000\r\n" + b" " * 2**16 + b"\r\n")
                sent += 2**16
        except OSError:
            pass  # it has hung up
        assert sent < 50 * 2**20


def test_a_body_that_does_not_come(tmp_path):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{"
    with served(FakeEngine(), tmp_path, body_seconds=0.2) as (address, _), raw(address, head) as open_socket:
        assert b"408" in open_socket.recv(1000)


# ------------------------------------------------------------------ media by address


@pytest.fixture
def media_host(monkeypatch):
    """A server of one picture on loopback; as if loopback were public."""
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


def test_media_by_address_only_from_named_hosts_and_never_private(media_host, engine, tmp_path, monkeypatch):
    (tmp_path / "media").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here = f"http://127.0.0.1:{media_host}/a.png"
    with served(engine, tmp_path / "media", hosts=("127.0.0.1", "localhost")) as (address, _):
        said = message_of(call(address, CHAT, asking(image(here.replace("127.0.0.1", "localhost")))))
        assert said.endswith("leads into a private network") and "127.0.0.1" not in said and "::1" not in said
        assert "`hosts` doesn't name" in message_of(call(address, CHAT, asking(image("http://a.example/a.png"))))
        monkeypatch.setattr(fetch, "_check_public", lambda *_: None)
        assert call(address, CHAT, asking(image(here)))[2]["choices"][0]["message"]["content"].startswith("9x9 ")
        for target in (f"http://[::1]:{media_host}/a.png", "http://169.254.169.254/latest", "file:///etc/hostname"):
            moved = f"http://127.0.0.1:{media_host}/moved?{target}"
            assert message_of(call(address, CHAT, asking(image(moved))))
    assert len(engine.seen) == 1 and not (tmp_path / "cache").exists()  # kept nowhere


# ------------------------------------------------------------------ who may ask


def test_without_a_key_only_this_machine_and_no_other_page(plain):
    port = plain.rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", "[::1]:80", "LOCALHOST"):
        assert call(plain, "/v1/models", Host=host)[0] == 200, host
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost@evil.example", "", "[::"):
        assert call(plain, "/v1/models", Host=host)[0] == 403, host
        assert call(plain, "/", Host=host)[0] == 403, host
    body = asking("a")
    for origin in ("http://evil.example", "null", f"https://localhost:{port}", "http://localhost"):
        assert call(plain, CHAT, body, Origin=origin, Host=f"localhost:{port}")[0] == 403, origin
    reply = call(plain, CHAT, body, Origin=f"http://localhost:{port}", Host=f"localhost:{port}")
    assert reply[0] == 200 and "access-control-allow-origin" not in reply[1]


def test_a_page_of_a_named_origin_may_ask(tmp_path):
    site = "https://chat.example"
    with served(FakeEngine(), tmp_path, origins=(site,)) as (address, _):
        reply = call(address, CHAT, asking("a"), Origin=site)
        assert reply[0] == 200 and reply[1]["access-control-allow-origin"] == site
        assert call(address, CHAT, asking("a"), Origin="https://other.example")[0] == 403


def test_a_key_opens_all_but_the_page_and_health(tmp_path):
    with served(FakeEngine(), tmp_path, api_key="schlüssel", origins=("https://a.example",)) as (address, _):
        right = "Bearer schlüssel".encode().decode("latin-1")
        for path in ("/v1/models", "/metrics", "/v1/none", "/openapi.json", "/docs"):
            reply = call(address, path)
            assert reply[0] == 401 and reply[1]["www-authenticate"] == "Bearer", path
        for wrong in ("", "schlüssel", "Bearer", "Bearer schlüsse", "Bearer schlüssel2", "Basic schlüssel"):
            given = wrong.encode().decode("latin-1")
            assert call(address, CHAT, asking("a"), Authorization=given)[0] == 401, wrong
        assert call(address, "/")[0] == call(address, "/health")[0] == 200
        for path in ("/v1/models", "/metrics"):
            assert call(address, path, Authorization=right, Host="models.example")[0] == 200
        assert call(address, CHAT, asking("a"), Authorization=right.replace("Bearer", "bearer"))[0] == 200


def test_nothing_of_a_body_is_read_before_the_key(tmp_path):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n"
    with served(FakeEngine(), tmp_path, api_key="key") as (address, _), raw(address, head) as open_socket:
        assert b"401" in open_socket.recv(1000)


# ------------------------------------------------------------------ the rest


def test_other_addresses_and_methods(plain):
    assert call(plain, "/v1/none")[0] == 404 and "under /v1" in message_of(call(plain, "/v1/none"))
    assert call(plain, CHAT)[0] == 405
    for path in ("/docs", "/redoc", "/openapi.json", "/../etc/hostname", "/static/a"):
        assert call(plain, path)[0] == 404


def test_a_failure_of_the_server_tells_no_more_than_that(tmp_path, caplog):
    engine = FakeEngine(fails_after=0, error=RuntimeError("secret at /home/someone"))
    caplog.set_level(logging.CRITICAL)
    with served(engine, tmp_path) as (address, _):
        reply = call(address, CHAT, asking("a"))
        assert reply[0] == 500 and message_of(reply) == "the server failed; its log tells more"
    assert not list(tmp_path.iterdir())


def test_metrics_count(engine, tmp_path):
    with served(engine, tmp_path) as (address, _):
        call(address, CHAT, asking("a b"))
        call(address, CHAT, asking("a", stream=True))
        call(address, CHAT, asking(n=0))
        call(address, "/v1/unknown")
        status, headers, text = call(address, "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=")
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert found[f'finetune_requests_total{{path="{CHAT}",status="200"}}'] == "2.0"
    assert found[f'finetune_requests_total{{path="{CHAT}",status="400"}}'] == "1.0"
    assert found['finetune_requests_total{path="other",status="404"}'] == "1.0"
    assert found['finetune_prompt_tokens_total{model="shelf"}'] == "20.0"
    assert found['finetune_cached_tokens_total{model="shelf"}'] == "8.0"
    assert found['finetune_completion_tokens_total{model="shelf"}'] == "3.0"
    assert found['finetune_first_token_seconds_count{model="shelf"}'] == "2.0"
    assert found["finetune_engine_requests_total"] == "2.0" and found["finetune_engine_running"] == "0.0"


def test_media_that_find_no_room_are_told_to_come_later(tmp_path):
    with served(FakeEngine(fails_after=0, error=Busy(2.4)), tmp_path) as (address, _):
        for more in ({}, {"stream": True}, {"n": 2}):
            reply = call(address, CHAT, asking("a", **more))
            assert reply[0] == 429 and reply[1]["retry-after"] == "3"


def test_health_tells_that_the_engine_has_ended(engine, tmp_path):
    with served(engine, tmp_path) as (address, _):
        assert call(address, "/health")[0] == 200
        engine.alive = False
        assert call(address, "/health")[::2] == (503, {"status": "failed"})


def test_while_draining_nothing_new_is_taken(engine, tmp_path):
    with served(engine, tmp_path) as (address, app):
        assert call(address, "/health")[0] == 200
        app.state.server.draining = True
        assert call(address, "/health")[:1] == (503,)
        for path in (CHAT, "/v1/classify", "/v1/score"):
            reply = call(address, path, asking("a"))
            assert reply[0] == 503 and reply[1]["retry-after"] == "5", path
    assert not engine.requests


def raw(address, head):
    """A socket on which a request has begun."""
    host, port = address.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), timeout=5)
    made.sendall(head.encode())
    return made


def ends(condition, seconds=3.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_ends_the_answer(stream, tmp_path):
    engine = FakeEngine(step_seconds=0.02)
    body = json.dumps(asking(image(picture_uri()), "word " * 1000, stream=stream, max_tokens=2000))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with served(engine, tmp_path) as (address, _):
        with raw(address, head + body) as open_socket:
            if stream:
                received = b""
                while received.count(b"data: ") < 5:
                    received += open_socket.recv(1000)
            else:
                assert ends(lambda: engine.streams and engine.streams[0].completion_tokens > 2)
            assert not engine.cancelled and list(tmp_path.iterdir())
        assert ends(lambda: engine.cancelled == 1)
        written = engine.streams[0].completion_tokens
        assert written < 500 and ends(lambda: not list(tmp_path.iterdir()))
        time.sleep(0.1)
        assert engine.streams[0].completion_tokens <= written + 1
        told = call(address, "/metrics")[2]
        assert 'finetune_stopped_total{model="shelf"} 1.0' in told
        assert f'path="{CHAT}",status="{200 if stream else 499}"}} 1.0' in told


def test_who_hangs_up_before_the_first_word_ends_it_too(tmp_path):
    engine = FakeEngine(delay=30)
    body = json.dumps(asking("a", stream=True))
    with served(engine, tmp_path) as (address, _):
        with raw(address, f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}"):
            assert ends(lambda: engine.streams)
        assert ends(lambda: engine.cancelled == 1)


def test_an_engine_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    from finetune.serving.http import app as module

    monkeypatch.setattr(module, "GRACE_SECONDS", 0.1)
    engine = FakeEngine(delay=30)
    with served(engine, tmp_path, timeout_seconds=0.1) as (address, _):
        reply = call(address, CHAT, asking("a"))
        assert reply[0] == 504 and engine.cancelled == 1


def test_sound_of_any_format_by_what_it_holds(plain):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(8_000, np.float32), 16_000, format="FLAC")
    data = base64.b64encode(file.getvalue()).decode()
    said = call(plain, CHAT, asking({"type": "input_audio", "input_audio": {"data": data, "format": "mp3"}}, "a"))
    assert said[2]["choices"][0]["message"]["content"] == "0.5s a "
