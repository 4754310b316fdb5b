"""Requests that are no requests: malformed, half-sent, too large, without the key. None gets a 5xx, none holds up the
others, and the key is in nothing that the server writes.
"""

import contextlib
import hmac
import http.client
import json
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import schemathesis
from fake_engine import FakeEngine, served
from hypothesis import HealthCheck, Phase, given, settings
from real_server import CHAT, body_of, get, head_of, idle, open_files, opened, server, wait_for
from schemathesis import GenerationMode
from tiny_serving import request, tiny_assistant

from finetune.data.sample import Message
from finetune.serving.http import access

pytestmark = pytest.mark.slow
KEY = "s3cret-key-of-the-server"
FIXED = settings(
    database=None,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
GOOD = body_of(request((Message("user", ("What is this",)),), 4))


@pytest.fixture(scope="module")
def assistant():
    return tiny_assistant()


def schema_of(port):
    """The server's own, with its model's name and, so that most requests get further than to an unknown key, closed."""
    content = json.loads(get(port, "/openapi.json"))
    for one in content["components"]["schemas"].values():
        if "model" in one.get("properties", {}):
            one["properties"]["model"] = {"const": "tiny"}
            one["required"] = [*one.get("required", []), "model"]
        if "properties" in one:
            one["additionalProperties"] = False
    return schemathesis.openapi.from_dict(content)


def cases(port, most):
    """schemathesis' requests: two thirds break the schema."""
    schema, found = schema_of(port), []
    for path, share in ((CHAT, 0.5), ("/v1/classify", 0.25), ("/v1/score", 0.25)):
        for mode, part in ((GenerationMode.NEGATIVE, 2 / 3), (GenerationMode.POSITIVE, 1 / 3)):

            @settings(FIXED, max_examples=int(most * share * part))
            @given(case=schema[path]["POST"].as_strategy(generation_mode=mode))
            def collect(case):
                found.append(case)

            collect()
    return found


def spoilt(content, generator):
    """A request with some of its bytes changed, doubled or left out."""
    content = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(content))
        change = generator.randrange(3)
        if change == 0:
            content[place] = generator.randrange(256)
        elif change == 1:
            content[place:place] = content[place : place + generator.randint(1, 40)]
        else:
            del content[place : place + generator.randint(1, 20)]
    return bytes(content)


def test_malformed_requests_get_no_server_error(assistant, full, tried, tmp_path):
    by_schema, by_bytes = (8000, 2000) if full else (20, 100)
    generator = random.Random(1)
    requests = [spoilt(head_of(GOOD) + GOOD.encode(), generator) for _ in range(by_bytes)]
    with server(assistant, log=tmp_path / "log", body_seconds=0.3, max_new_tokens=64) as running:

        def by_case(case):
            response = case.call(base_url=running.address, timeout=20)
            assert response.status_code < 500, (case.as_curl_command(), response.text)
            return response.status_code

        def by_socket(sent):
            with opened(running.port, sent) as connection:
                answer = connection.recv(1000)  # b"": closed after `body_seconds`; half a head is no request
            status = int(answer.split()[1]) if answer else 0
            assert status < 500, (sent, answer)
            return status

        with ThreadPoolExecutor(8) as pool:
            statuses = Counter([*map(by_case, cases(running.port, by_schema)), *pool.map(by_socket, requests)])
        wait_for(lambda: idle(running.port))
        log = running.log.read_text(errors="replace")
    assert "Traceback" not in log, log[-2000:]
    assert statuses[200] and statuses[400]
    count = ", ".join(f"{number:,} × {status or 'closed'}" for status, number in sorted(statuses.items()))
    tried(f"{statuses.total():,} malformed requests, by schemathesis and by spoilt bytes", f"no 5xx: {count}")


HALVES = {
    "nothing": b"",
    "half a head": b"POST /v1/chat/completions HTTP/1.1\r\nHost: localh",
    "a head": head_of(GOOD),
    "half a body": head_of(GOOD) + GOOD.encode()[:-10],
    "half a chunk": head_of("").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"ff\r\n{",
    "a huge length": head_of("").replace(b"Length: 0", b"Length: 99999999999"),
}


def test_half_sent_and_endless_requests_hold_up_nobody(assistant, tried):
    with server(assistant, body_seconds=1, max_connections=64) as running:
        ask(running.port)  # what is loaded at first
        files = open_files(running.process)
        with contextlib.ExitStack() as stack:
            halves = [stack.enter_context(opened(running.port, sent)) for sent in HALVES.values() for _ in range(8)]
            slowest = max(ask(running.port) for _ in range(5))
            for connection in halves:
                assert connection.recv(1000)[:12] in (b"", b"HTTP/1.1 408"), "neither closed nor told"
        endless = opened(running.port, HALVES["half a chunk"][:-5])
        sent = 0
        with endless, pytest.raises(OSError):
            while sent < 2**30:
                endless.sendall(b"10000\r\n" + b" " * 2**16 + b"\r\n")
                sent += 2**16
        assert sent < 128 * 2**20  # `max_request_bytes` and what is on its way
        wait_for(lambda: idle(running.port) and open_files(running.process) <= files)
    assert slowest < 1
    tried(
        f"{len(halves)} half-sent requests and an endless one", f"closed in time; others waited {slowest:.2f} s at most"
    )


def ask(port):
    """Seconds that an honest request takes."""
    begin = time.monotonic()
    with opened(port, head_of(GOOD) + GOOD.encode()) as connection:
        assert connection.recv(12) == b"HTTP/1.1 200"
    return time.monotonic() - begin


class Endless(FakeEngine):
    def words(self, request):
        return ["x" * 100_000] * 1000


def test_a_client_that_reads_nothing_of_its_answer_is_let_go(tried, tmp_path):
    engine = Endless()
    body = body_of(request((Message("user", ("a",)),), 1000), model="shelf", stream=True)
    with served(engine, tmp_path, body_seconds=0.5) as (address, _):
        with opened(int(address.rpartition(":")[2]), head_of(body) + body.encode()) as connection:
            wait_for(lambda: engine.cancelled)
        assert engine.streams[0].completion_tokens < 900 and connection
        received = 0
        with opened(int(address.rpartition(":")[2]), head_of(body) + body.encode()) as connection:
            while received < 30 * 2**20:  # slowly, for longer than that
                received += len(connection.recv(2**20))
                time.sleep(0.005)
    tried("a client that reads nothing of its answer", "let go after `body_seconds`")


def test_the_key_is_compared_in_constant_time_and_written_nowhere(assistant, tried, tmp_path, monkeypatch):
    seen = []
    compare = hmac.compare_digest
    monkeypatch.setattr(
        access.hmac, "compare_digest", lambda given, key: seen.append((given, key)) or compare(given, key)
    )
    control = access.AccessControl(None, KEY)
    assert control.refusal("/v1/models", {b"authorization": b"Bearer s"}).status == 401
    assert control.refusal("/v1/models", {b"authorization": f"Bearer {KEY}".encode()}) is None
    assert seen == [(b"s", KEY.encode()), (KEY.encode(), KEY.encode())]  # whole, by nothing else
    wrong = ("", "Bearer", f"Basic {KEY}", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Bearer {KEY.upper()}", KEY)
    with server(assistant, log=tmp_path / "log", api_key=KEY, body_seconds=0.3) as running:
        answers = []

        def send(path, body, key):
            connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
            connection.request("POST" if body else "GET", path, body, {"Authorization": key})
            response = connection.getresponse()
            answers.append(f"{response.getheaders()} {response.read()}")
            return response.status

        for key in wrong:
            assert send(CHAT, GOOD, key) == send("/v1/models", None, key) == send("/openapi.json", None, key) == 401
        right = f"Bearer {KEY}"
        assert send(CHAT, GOOD, right) == 200 and send("/metrics", None, right) == 200
        assert send(CHAT, "{", right) == 400 and send("/v1/none", None, right) == 404
        with opened(running.port, f"GET /{KEY} HTTP/9\r\nAuthorization: {right}\r\n\r\n".encode()) as connection:
            answers.append(connection.recv(1000).decode())
        log = running.log.read_text()
    assert running.address in log
    assert KEY not in log and not [answer for answer in answers if KEY in answer]
    tried(f"{len(wrong)} wrong keys, and the right one with wrong requests", "401; the key in no answer and no log")
