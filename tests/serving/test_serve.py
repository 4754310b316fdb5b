"""`finetune serve`: its arguments, and how a server starts and stops."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_engine import FakeEngine, call, served

import finetune
from finetune.common.errors import RecipeError
from finetune.serving.http.settings import ServerOptions
from finetune.serving.serve import address, listening_socket, parse_models, serve_until, stop_on_signals

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
CHAT = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{}"
STEP_SECONDS = 0.05

# A server process whose engine writes a word each 50 ms.
SERVER = """
import sys
from fake_engine import FakeEngine
from finetune.serving.http.settings import ServerOptions
from finetune.serving.serve import listening_socket, run_server
with listening_socket("127.0.0.1", 0) as listener:
    run_server(FakeEngine(step_seconds=0.05), ServerOptions(), listener)
"""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "models.example", ""])
@pytest.mark.parametrize("key", [None, ""])
def test_another_address_needs_a_key(host, key):
    with pytest.raises(RecipeError, match="api_key="):
        finetune.serve(["run"], host=host, api_key=key)


def test_unusable_addresses_and_options(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RecipeError, match="choose another port="):
            finetune.serve([str(tmp_path)], port=taken.getsockname()[1])
    with pytest.raises(RecipeError, match="port 70000"):
        finetune.serve([str(tmp_path)], port=70_000)
    with pytest.raises(RecipeError, match="no such address"):
        finetune.serve([str(tmp_path)], host="999.1.1.1", api_key="key")
    with pytest.raises(RecipeError, match="did you mean 'max_batch'"):
        finetune.serve([str(tmp_path)], options=["max_batches=4"])


def test_names_of_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/shelf/merged", "runs/mood/adapter", "a=b"):
        (tmp_path / folder).mkdir(parents=True)
    assert parse_models(
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
    for models, message in (
        (["runs/shelf", "runs/shelf/merged"], "runs/shelf has the name 'shelf' already"),
        (["=a"], "NAME=RUN"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_models(models)


def test_missing_libraries_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(RecipeError, match=r"pip install 'finetune-kit\[serve\]'"):
        finetune.serve([str(tmp_path)])


# ------------------------------------------------------------------ stopping


@contextlib.contextmanager
def running(folder, stop, **options):
    """(address, engine) of a server in a thread until `stop` is set."""
    engine = FakeEngine(step_seconds=STEP_SECONDS)
    with listening_socket("127.0.0.1", 0) as listener:
        arguments = (stop, engine, ServerOptions(**options), listener, folder)
        thread = threading.Thread(target=serve_until, args=arguments, daemon=True)
        thread.start()
        wait_until(lambda: status(address(listener)) == 200)
        yield address(listener), thread
        stop.set()
        thread.join(10)
        assert not thread.is_alive()


def ask(address, words):
    """A socket on which a streamed answer of so many words has begun, and the bytes received so far."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    body = json.dumps(
        {"model": "shelf", "stream": True, "messages": [{"role": "user", "content": " ".join("w" * words)}]}
    )
    connection.sendall(CHAT.format(len(body), body).encode())
    received = b""
    while b"data: " not in received:
        received += connection.recv(1000)
    return connection, received


def rest(connection, received):
    """All that a connection receives until it is closed."""
    with connection:
        while chunk := connection.recv(10_000):
            received += chunk
    return received


def status(address):
    """Of /health; None without a connection."""
    try:
        return call(address, "/health")[0]
    except OSError:
        return None


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_answers_finish(number, tmp_path):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_on_signals(tmp_path) as stop, running(tmp_path, stop) as (address, thread):
        connection, received = ask(address, 20)
        os.kill(os.getpid(), number)
        wait_until(lambda: status(address) == 503)  # so that load balancers send no more
        assert thread.is_alive()
        received = rest(connection, received)
        assert received.count(b'"content": "w ') == 20 and b"data: [DONE]" in received
        thread.join(10)
        assert status(address) is None and not list(tmp_path.iterdir())
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_draining_has_a_time_limit(tmp_path):
    stop = threading.Event()
    with running(tmp_path, stop, drain_seconds=0.2) as (address, _):
        connection, received = ask(address, 1000)
        stop.set()
        received = rest(connection, received)
    assert b'"error": {"message": "the server stopped"' in received and b"[DONE]" not in received


def test_a_process_ends_with_its_answers_or_at_the_second_signal(tmp_path):
    paths = os.pathsep.join((str(TESTS.parent), str(TESTS / "helpers")))
    environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for words, signals, expected in ((20, 1, 0), (1000, 2, 128 + signal.SIGTERM)):
        command = [sys.executable, "-c", SERVER]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            line = process.stderr.readline().strip()
            assert line.startswith("http://127.0.0.1:") and line.endswith("  shelf, 写字"), line
            connection, received = ask(line.split()[0], words)
            assert list(tmp_path.glob("finetune-serve-*"))
            process.send_signal(signal.SIGTERM)
            if signals == 2:
                time.sleep(0.3)
                assert process.poll() is None
                process.send_signal(signal.SIGTERM)
                connection.close()
            else:
                received = rest(connection, received)
                assert received.count(b'"content": "w ') == words and b"data: [DONE]" in received
            assert process.wait(10) == expected and not process.stderr.read()
            assert not list(tmp_path.glob("finetune-serve-*"))
        finally:
            process.kill()
            process.wait()
            process.stderr.close()


# ------------------------------------------------------------------ connections


@pytest.mark.parametrize(
    "beginning",
    [
        "",
        "GET / HTTP/1.1\r\nHost: localhost\r\n",
        "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HT",
        "POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n",
    ],
)
def test_connections_without_a_request_are_closed(beginning, tmp_path):
    """Also those on which a byte arrives now and then."""
    with served(FakeEngine(), tmp_path, body_seconds=0.5, max_connections=4) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        with contextlib.ExitStack() as stack:
            connections = []
            for _ in range(4):
                connections.append(stack.enter_context(socket.create_connection((host, int(port)), timeout=10)))
                connections[-1].sendall(beginning.encode())
                if "\r\n\r\n" in beginning:
                    assert connections[-1].recv(1000).startswith(b"HTTP/1.1 ")
            assert status(address) == 503
            end = time.monotonic() + 4
            while status(address) == 503 and time.monotonic() < end:
                for connection in connections:
                    with contextlib.suppress(OSError):
                        connection.sendall(b"x")
                time.sleep(0.1)
            assert status(address) == 200


def test_an_answer_may_take_longer_than_headers(tmp_path):
    with served(FakeEngine(step_seconds=STEP_SECONDS), tmp_path, body_seconds=0.3) as (address, _):
        connection, received = ask(address, 20)
        with connection:
            while b"[DONE]" not in received:
                received += connection.recv(10_000) or pytest.fail("closed too early")
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")  # the connection can be used again
            while b'"ok"' not in received:
                received += connection.recv(10_000) or pytest.fail("closed too early")
