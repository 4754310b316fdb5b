"""A server whose clients come and go: the others get their own answers, no place in the queue is lost, and SIGTERM ends
it in time.
"""

import http.client
import json
import os
import random
import signal
import socket
import threading
import time
from contextlib import contextmanager
from multiprocessing import get_context

import pytest
from tiny_serving import WORDS, alone, request, tiny_assistant

from finetune.data.sample import Message
from finetune.serving.engine.engine import BatchingEngine
from finetune.serving.http.settings import ServerOptions
from finetune.serving.serve import listening_socket, run_server

pytestmark = pytest.mark.slow
QUEUE = 16


@pytest.fixture(scope="module")
def assistant():
    return tiny_assistant()


@contextmanager
def server(assistant, **options):
    """(port, process) of a server with real sockets and signals."""
    with listening_socket("127.0.0.1", 0) as listener:
        settings = ServerOptions(**{"queue_limit": QUEUE, "timeout_seconds": 60, "drain_seconds": 5, **options})
        engine = BatchingEngine({"tiny": assistant}, settings)
        process = get_context("fork").Process(target=run_server, args=(engine, settings, listener), daemon=True)
        process.start()
        port = listener.getsockname()[1]
    try:
        wait_for(lambda: get(port, "/health"))
        yield port, process
    finally:
        process.kill()
        process.join()


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.05)
    assert condition()


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    return connection.getresponse().read().decode()


def gauge(port, name):
    lines = get(port, "/metrics").splitlines()
    return next(float(line.split()[-1]) for line in lines if line.split(" ")[0].endswith(name))


def body_of(wanted):
    content = "".join(wanted.messages[0].content)
    return json.dumps(
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": wanted.max_new_tokens,
            "temperature": 0,
        }
    )


def leaves(port, body, generator):
    """A client that asks and is gone, at once or a little later."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body.encode())
        time.sleep(generator.choice([0, 0, 0.002, 0.02]))
        # closed with RST, as by a process that was killed
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def stays(port, body):
    """(status, text) of a client that waits, and comes again where the queue is full."""
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=90)
        connection.request("POST", "/v1/chat/completions", body)
        response = connection.getresponse()
        content = response.read()
        if response.status == 200:
            return 200, json.loads(content)["choices"][0]["message"]["content"]
        if response.status not in (429, 503):
            return response.status, content
        time.sleep(0.05)


def test_clients_that_leave_take_nothing_from_those_that_stay(assistant, full, tried):
    questions = random.Random(5)
    wanted = [request((Message("user", (" ".join(questions.choices(WORDS, k=4)),)),), 8) for _ in range(12)]
    expected = alone(assistant, wanted)
    bodies = [body_of(one) for one in wanted]
    leaving, staying = (4500, 1200) if full else (160, 48)
    outcomes = []

    def leave(seed):
        generator = random.Random(seed)
        for _ in range(leaving // 8):
            leaves(port, generator.choice(bodies), generator)

    def stay(seed):
        for number in range(seed, staying, 4):
            choice = number % len(bodies)
            outcomes.append((stays(port, bodies[choice]), expected[choice]))

    with server(assistant) as (port, process):
        threads = [threading.Thread(target=leave, args=(seed,)) for seed in range(8)]
        threads += [threading.Thread(target=stay, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lost = [outcome for outcome, text in outcomes if outcome != (200, text)]
        assert len(outcomes) == staying and not lost, lost[:3]
        wait_for(lambda: gauge(port, "requests_waiting") == gauge(port, "requests_running") == 0)
        begin = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        process.join(10)
        seconds = time.monotonic() - begin
        assert process.exitcode == 0 and seconds < 5  # nothing is left to drain
    tried(
        f"server: {staying:,} requests beside {leaving:,} clients that leave",
        f"each its own answer; queue empty; ended {seconds:.1f} s after SIGTERM",
    )


def test_a_server_that_is_busy_ends_in_the_time_it_was_given():
    slow = tiny_assistant(ends=range(0))
    slow.model.causal_lm.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    long = body_of(request((Message("user", ("What is this",)),), 200))
    with server(slow, drain_seconds=0.5) as (port, process):
        connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=30) for _ in range(QUEUE)]
        for connection in connections:
            connection.request("POST", "/v1/chat/completions", long)
        wait_for(lambda: gauge(port, "requests_running") > 0)
        os.kill(process.pid, signal.SIGTERM)
        process.join(10)
        assert process.exitcode == 0
        statuses = {connection.getresponse().status for connection in connections}
    assert statuses <= {200, 429, 503, 504}
