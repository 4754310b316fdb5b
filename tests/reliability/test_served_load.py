"""A server whose clients come and go: the others get their own answers, no place in the queue is lost, and SIGTERM ends
it in time.
"""

import http.client
import json
import math
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest
from real_server import (
    CHAT,
    body_of,
    gauge,
    head_of,
    idle,
    open_files,
    opened,
    resident_bytes,
    server,
    wait_for,
)
from tiny_serving import WORDS, alone, pictures, request, tiny_assistant

from finetune.data.sample import Medium, Message

pytestmark = pytest.mark.slow
QUEUE = 16


@pytest.fixture(scope="module")
def assistant():
    return tiny_assistant()


def leaves(port, body, generator):
    """A client that asks and is gone, at once or a little later."""
    with opened(port, head_of(body) + body.encode()) as connection:
        time.sleep(generator.choice([0, 0, 0.002, 0.02]))
        # closed with RST, as by a process that was killed
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def stays(port, body):
    """(status, text) of a client that waits, and comes again where the queue is full."""
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=90)
        connection.request("POST", CHAT, body)
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

    with server(assistant) as running:
        port, process = running.port, running.process
        threads = [threading.Thread(target=leave, args=(seed,)) for seed in range(8)]
        threads += [threading.Thread(target=stay, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lost = [outcome for outcome, text in outcomes if outcome != (200, text)]
        assert len(outcomes) == staying and not lost, lost[:3]
        wait_for(lambda: idle(port))
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
    long = body_of(request((Message("user", ("What is this",)),), 200))
    with server(slow_assistant(0.1), drain_seconds=0.5) as running:
        connections = [opened(running.port, head_of(long) + long.encode()) for _ in range(QUEUE)]
        wait_for(lambda: gauge(running.port, "requests_running") > 0)
        os.kill(running.process.pid, signal.SIGTERM)
        running.process.join(10)
        assert running.process.exitcode == 0
        statuses = {int(connection.recv(1000).split()[1]) for connection in connections}
    assert statuses <= {200, 429, 503, 504}


def slow_assistant(seconds):
    """Its answers don't end by themselves; each step takes so long."""
    slow = tiny_assistant(ends=range(0))
    slow.model.causal_lm.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return slow


def asks(port):
    os.setsid()
    body = body_of(request((Message("user", ("What is this",)),), 2000), stream=True)
    with opened(port, head_of(body) + body.encode()) as connection:
        while connection.recv(1000):
            pass


def test_a_client_that_is_killed_frees_its_place(tried):
    """The only place in the batch, and the only one in the queue."""
    with server(slow_assistant(0.01), max_batch=1, queue_limit=1) as running:
        clients = [get_context("fork").Process(target=asks, args=(running.port,)) for _ in range(2)]
        for number, client in enumerate(clients):
            client.start()
            places = ("requests_running", "requests_waiting")
            wait_for(lambda place=places[number]: gauge(running.port, place) == 1)
        body = body_of(request((Message("user", ("What is this",)),), 2))
        with opened(running.port, head_of(body) + body.encode()) as refused:
            assert refused.recv(12).split()[1] == b"429"
        for client in clients:
            client.kill()
            client.join()
        begin = time.monotonic()
        assert stays(running.port, body)[0] == 200
        seconds = time.monotonic() - begin
        wait_for(lambda: idle(running.port))
    assert seconds < 2
    tried("clients killed with `kill -9` while they are answered", f"their places were free after {seconds:.2f} s")


def test_clients_each_get_their_own_answers(assistant, full, tried, tmp_path):
    """Each asks about its own picture, by turns whole, as a stream, and the labels head."""
    paths, generator, clients = pictures(tmp_path, 32), random.Random(3), 32
    wanted = [request((Message("user", (*words(generator), Medium("image", path))),), 12) for path in paths]
    expected = alone(assistant, wanted)
    labels = [answer.probabilities for answer in assistant.ask("colour", [one.messages for one in wanted])]
    assert len(set(expected)) > 24 and len({json.dumps(dict(one)) for one in labels}) > 24
    seconds, least = (1200, 0) if full else (0, 2)
    end, asked, wrong = time.monotonic() + seconds, Counter(), []

    def client(number, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while asked[number] < least or time.monotonic() < end:
            kind = (asked[number] + number) % 3
            if kind < 2:
                connection.request("POST", CHAT, body_of(wanted[number], stream=bool(kind)))
            else:
                connection.request("POST", "/v1/classify", body_of(wanted[number], task="colour"))
            content = connection.getresponse().read().decode()
            if kind == 2:
                found = json.loads(content)["data"][0]["probabilities"]
                right = all(math.isclose(found[label], labels[number][label], abs_tol=1e-4) for label in found)
            else:
                found = streamed(content) if kind else json.loads(content)["choices"][0]["message"]["content"]
                right = found.strip() == expected[number]
            if not right:
                wrong.append((number, content))
            asked[number] += 1

    with server(assistant, queue_limit=64) as running:
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, range(clients), [running.port] * clients))
        wait_for(lambda: idle(running.port))
    assert not wrong, wrong[:3]
    count = asked.total()
    assert min(asked.values()) >= max(least, 1)
    tried(f"server: {clients} clients, {count:,} requests, each with its picture", "none lost, none mixed")


def words(generator):
    return (" ".join(generator.choices(WORDS, k=generator.randint(1, 8))),)


def streamed(content):
    events = [json.loads(line[6:]) for line in content.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])


@pytest.mark.full
def test_memory_and_files_stay_as_they_are(assistant, tried, tmp_path):
    """50,000 requests by 8 clients; the first tenth fills the caches."""
    count, generator = int(os.environ.get("SERVED_REQUESTS", "50000")), random.Random(9)
    bodies = []
    for path in pictures(tmp_path, 64):
        bodies.append(body_of(request((Message("user", (*words(generator), Medium("image", path))),), 4)))
        bodies.append(body_of(request((Message("user", words(generator)),), 4)))
    caches = {"prefix_cache_bytes": 2**22, "media_cache_bytes": 2**20}

    def client(share, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for number in range(share):
            connection.request("POST", CHAT, bodies[number % len(bodies)])
            response = connection.getresponse()
            response.read()
            assert response.status == 200
        connection.close()

    def ask(number, port):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(client, [number // 8] * 8, [port] * 8))

    with server(assistant, **caches) as running:
        ask(count // 10, running.port)
        memory, files = resident_bytes(running.process), open_files(running.process)
        ask(count - count // 10, running.port)
        wait_for(lambda: open_files(running.process) <= files)
        growth = resident_bytes(running.process) / memory - 1
    tried(f"server: {count:,} requests", f"resident memory {growth:+.1%}, open files {files} before and after")
    assert growth < 0.05
