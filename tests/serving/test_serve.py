"""Serving as a process: what it refuses, how it begins, and how it ends."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import finetune
from finetune.common.errors import RecipeError
from finetune.serving import serve as stage

TESTS = Path(__file__).parents[1] / "helpers"
CHAT = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{}"

# A server over an engine that writes a word each 50 ms.
SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
from fake_engine import FakeEngine
from finetune.serving.http.settings import options_of
from finetune.serving.serve import bound, run_server
with bound("127.0.0.1", 0) as listener:
    run_server(FakeEngine(step_seconds=0.05), options_of(sys.argv[2:]), listener)
"""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "models.example", ""])
@pytest.mark.parametrize("key", [None, ""])
def test_another_address_needs_a_key(host, key):
    with pytest.raises(RecipeError, match="--api-key"):
        finetune.serve(["run"], host=host, api_key=key)


def test_an_address_that_can_not_be_had(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RecipeError, match="choose another --port"):
            finetune.serve([str(tmp_path)], port=taken.getsockname()[1])
    with pytest.raises(RecipeError, match=r"--port 70000"):
        finetune.serve([str(tmp_path)], port=70_000)
    with pytest.raises(RecipeError, match="no such address"):
        finetune.serve([str(tmp_path)], host="999.1.1.1", api_key="key")
    with pytest.raises(RecipeError, match="did you mean 'max_batch'"):
        finetune.serve([str(tmp_path)], options=["max_batches=4"])


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/shelf/merged", "runs/mood/adapter", "a=b"):
        (tmp_path / folder).mkdir(parents=True)
    assert stage.named(
        ["runs/shelf", "m=runs/mood", "runs/mood/adapter", "x=a=b", "a=b", "user/name", "c=user/name"]
    ) == {
        "shelf": "runs/shelf",
        "m": "runs/mood",
        "mood": "runs/mood/adapter",
        "x": "a=b",
        "a=b": "a=b",
        "user/name": "user/name",
        "c": "user/name",
    }
    for given, said in ((["runs/shelf", "runs/shelf/merged"], "'shelf' is runs/shelf already"), (["=a"], "NAME=RUN")):
        with pytest.raises(RecipeError, match=said):
            stage.named(given)


@pytest.fixture
def server(tmp_path):
    started = []

    def start(*options):
        environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(TESTS / "serving"), *options],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        started.append(process)
        line = process.stderr.readline().strip()
        assert line.startswith("http://127.0.0.1:") and line.endswith("  shelf, 写字"), line
        return process, line.split()[0]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


def ask(address, words, stream=True):
    """A socket on which an answer of so many words has begun to come, and what has come."""
    host, port = address.removeprefix("http://").split(":")
    opened = socket.create_connection((host, int(port)), timeout=10)
    messages = [{"role": "user", "content": " ".join("w" * words)}]
    body = json.dumps({"model": "shelf", "stream": stream, "messages": messages})
    opened.sendall(CHAT.format(len(body), body).encode())
    received = b""
    while b"data: " not in received:
        received += opened.recv(1000)
    return opened, received


def status(address, path="/health"):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as opened:
        opened.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return int(opened.recv(1000).split()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_end(number, server, tmp_path):
    process, address = server()
    assert status(address) == 200
    opened, received = ask(address, 20)
    process.send_signal(number)
    end = time.monotonic() + 5
    while status(address) == 200 and time.monotonic() < end:
        time.sleep(0.02)
    assert status(address) == 503  # and balancers send no more
    while chunk := opened.recv(10_000):
        received += chunk
    assert received.count(b'"content": "w ') == 20 and b"data: [DONE]" in received
    assert process.wait(10) == 0 and not process.stderr.read()
    assert not list(tmp_path.glob("finetune-serve-*"))
    with pytest.raises(OSError):
        status(address)


def test_what_takes_too_long_is_cut_off(server):
    process, address = server("drain_seconds=0.2")
    opened, received = ask(address, 1000)
    process.send_signal(signal.SIGTERM)
    while chunk := opened.recv(10_000):
        received += chunk
    assert b'"error": {"message": "the server ends"' in received and b"[DONE]" not in received
    assert process.wait(10) == 0
    opened.close()


def test_a_second_signal_ends_at_once(server, tmp_path):
    process, address = server()
    opened, _ = ask(address, 1000)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(2) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("finetune-serve-*"))
    opened.close()


@pytest.mark.parametrize(
    "beginning",
    [
        "",
        "GET / HTTP/1.1\r\nHost: localhost\r\n",
        "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HT",
        "POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n",
    ],
)
def test_connections_on_which_nothing_is_asked_are_closed(beginning, server):
    """Whoever sends a byte now and then, too."""
    _, address = server("body_seconds=0.5", "max_connections=4")
    host, port = address.removeprefix("http://").split(":")
    opened = []
    for _ in range(4):
        opened.append(socket.create_connection((host, int(port)), timeout=10))
        opened[-1].sendall(beginning.encode())
        if "\r\n\r\n" in beginning:
            assert opened[-1].recv(1000).startswith(b"HTTP/1.1 ")
    assert status(address) == 503
    end = time.monotonic() + 4
    while status(address) == 503 and time.monotonic() < end:
        for one in opened:
            with contextlib.suppress(OSError):
                one.sendall(b"x")
        time.sleep(0.1)
    assert status(address) == 200
    for one in opened:
        one.close()


def test_an_answer_may_take_longer_than_a_head(server):
    _, address = server("body_seconds=0.3")
    opened, received = ask(address, 20)
    while b"[DONE]" not in received:
        received += opened.recv(10_000) or pytest.fail("closed too early")
    opened.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")  # and the connection goes on
    while b'"ok"' not in received:
        received += opened.recv(10_000) or pytest.fail("closed too early")
    opened.close()


def test_without_its_libraries_it_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(RecipeError, match=r"pip install 'finetune\[serve\]'"):
        finetune.serve([str(tmp_path)])
