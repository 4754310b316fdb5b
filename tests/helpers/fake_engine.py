"""An engine without a model: it answers by a script, and takes down what it is asked."""

import asyncio
import http.client
import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.common.errors import DataError
from finetune.data.media import decode
from finetune.data.sample import Answer, Medium
from finetune.serving.engine.contract import Busy, Piece, Request, Stats, TimedOut, Token

MODELS: dict[str, dict[str, Any]] = {
    "shelf": {
        "media": ("image", "audio", "video"),
        "tasks": {
            "mood": {"head": "label", "labels": ["bad", "good"]},
            "stars": {"head": "score", "labels": None},
            "words": {"head": "language", "labels": None},
        },
        "context": 512,
        "path": "/home/someone/runs/shelf",
    },
    "写字": {"media": (), "tasks": {}, "context": None, "path": "/home/someone/runs/text"},
}


class FakeStream:
    """Writes the last user's words back, one a step, after what it says of each medium."""

    def __init__(self, engine: "FakeEngine", request: Request) -> None:
        self.engine, self.request = engine, request
        self.prompt_tokens = self.completion_tokens = self.cached_tokens = 0
        self.cancelled = self.ended = False

    def cancel(self) -> None:
        self.cancelled = True
        if not self.ended:
            self.engine.cancelled += 1
            self.ended = True

    async def __aiter__(self):
        await asyncio.sleep(self.engine.delay)
        words = self.engine.words(self.request)
        kept = words[: self.request.max_new_tokens]
        self.prompt_tokens, self.cached_tokens = 10, 4
        for number, word in enumerate(kept):
            if self.engine.fails_after == number:
                raise self.engine.error
            await asyncio.sleep(self.engine.step_seconds)
            if self.engine.stopped:
                raise TimedOut("the server ends")
            self.completion_tokens += 1
            other = (("otherwise", b"otherwise", float("-inf")),) * (self.request.logprobs or 0)
            token = (Token(word, word.encode(), -0.5, other),) if self.request.logprobs is not None else ()
            reason = None if number + 1 < len(kept) else "stop" if len(kept) == len(words) else "length"
            if reason:
                self.ended = True
            yield Piece(word, token, reason)


class FakeEngine:
    def __init__(self, **script: Any) -> None:
        self.models = MODELS
        self.requests: list[Request] = []
        self.seen: list[Any] = []  # decoded media
        self.cancelled = 0
        self.stopped = False
        self.alive = True
        self.step_seconds = script.get("step_seconds", 0.0)
        self.delay = script.get("delay", 0.0)
        self.fails_after = script.get("fails_after")
        self.error = script.get("error", TimedOut("no end after 1 s"))
        self.busy_from = script.get("busy_from", 10**6)
        self.refuses_first = script.get("refuses_first", 0)
        self.streams: list[FakeStream] = []

    def start(self) -> None:
        pass

    def submit(self, request: Request) -> FakeStream:
        if len(self.requests) >= self.busy_from:
            raise Busy(2.4)
        if self.refuses_first:
            self.refuses_first -= 1
            raise Busy(0.1)
        self.requests.append(request)
        self.streams.append(FakeStream(self, request))
        return self.streams[-1]

    def words(self, request: Request) -> list[str]:
        content = request.messages[-1].content
        text = "".join(part for part in content if isinstance(part, str))
        if request.schema is not None:
            return ['{"colour": ', '"red"}']
        seen = [f"{self.look(part)} " for part in content if isinstance(part, Medium)]
        return seen + [f"{word} " for word in text.split(" ")]

    def look(self, medium: Medium) -> str:
        sampling = {"count": 2} if medium.kind == "video" else {}
        decoded = decode(medium.kind, medium.path, **sampling)
        self.seen.append(decoded)
        if medium.kind == "image":
            return f"{decoded.width}x{decoded.height}"
        return f"{len(decoded) / 16_000:.1f}s" if medium.kind == "audio" else f"{len(decoded.frames)} frames"

    async def ask(self, model: str, task: str, messages: Any, timeout_seconds: float) -> Answer:
        if len(self.requests) >= self.busy_from:
            raise Busy(0.1)
        await asyncio.sleep(self.delay)
        text = "".join(part for part in messages[-1].content if isinstance(part, str))
        if text == "unreadable":
            raise DataError("can't be read")
        if task == "stars":
            return Answer(number=float("nan") if text == "nan" else float(len(text)))
        return Answer("good", {"bad": 0.25, "good": 0.75})

    def stats(self) -> Stats:
        return Stats({"requests": float(len(self.requests))}, {"running": 0.0})

    def stop(self, drain_seconds: float) -> None:
        end = time.monotonic() + drain_seconds
        while time.monotonic() < end and not all(stream.ended for stream in self.streams):
            time.sleep(0.02)
        self.stopped = True


@contextmanager
def served(engine: FakeEngine, folder: Path, api_key: str | None = None, **options: Any):
    """(address, app) of a server in a thread."""
    import uvicorn

    from finetune.serving.http.app import build_app
    from finetune.serving.http.settings import Options
    from finetune.serving.serve import address, bound

    app = build_app(engine, Options(**options), folder, api_key)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="critical", lifespan="off", ws="none", timeout_graceful_shutdown=1)
    )
    with bound("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield address(listener), app
        finally:
            server.should_exit = True
            thread.join(5)


def call(address: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    """(status, headers in lower case, JSON or text) of one request; POST where there is a body, JSON or bytes."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request("GET" if body is None else "POST", path, content, headers)
        reply = connection.getresponse()
        text = reply.read().decode()
        found = {name.lower(): value for name, value in reply.getheaders()}
        return reply.status, found, json.loads(text) if found.get("content-type") == "application/json" else text
    finally:
        connection.close()
