"""An engine without a model: it answers by a script and records its requests."""

import asyncio
import http.client
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.common.errors import DataError
from finetune.data.media import decode
from finetune.data.sample import Answer, Medium
from finetune.serving.engine.contract import AnswerPiece, Busy, ModelInfo, Request, Stats, TaskInfo, TimedOut, Token

MODELS = {
    "shelf": ModelInfo(
        media=("image", "audio", "video"),
        tasks={
            "mood": TaskInfo("label", ("bad", "good")),
            "stars": TaskInfo("score"),
            "words": TaskInfo("language", prompt="What is this?"),
        },
        context=512,
    ),
    "写字": ModelInfo(media=(), tasks={}, context=None),
}


class FakeStream:
    """Repeats the last user's words, one per step, after a description of each medium."""

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
        sent = words[: self.request.max_new_tokens]
        self.prompt_tokens, self.cached_tokens = 10, 4
        for number, word in enumerate(sent):
            if self.engine.fails_after == number:
                raise self.engine.error
            await asyncio.sleep(self.engine.step_seconds)
            if self.engine.stopped:
                raise TimedOut("the server stopped")
            self.completion_tokens += 1
            others = (("otherwise", b"otherwise", float("-inf")),) * (self.request.logprobs or 0)
            token = (Token(word, word.encode(), -0.5, others),) if self.request.logprobs is not None else ()
            reason = None if number + 1 < len(sent) else "stop" if len(sent) == len(words) else "length"
            if reason:
                self.ended = True
            yield AnswerPiece(word, token, reason)


@dataclass
class FakeEngine:
    """`busy_from`: the number of the first request to be refused; `refuses_first`: how many are refused first."""

    step_seconds: float = 0.0
    delay: float = 0.0
    fails_after: int | None = None
    error: BaseException = field(default_factory=lambda: TimedOut("no end after 1 s"))
    busy_from: int = 10**6
    refuses_first: int = 0
    requests: list[Request] = field(default_factory=list)
    decoded: list[Any] = field(default_factory=list)  # media
    streams: list[FakeStream] = field(default_factory=list)
    cancelled: int = 0
    stopped: bool = False
    alive: bool = True
    models = MODELS

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
        media = [f"{self.describe(part)} " for part in content if isinstance(part, Medium)]
        return media + [f"{word} " for word in text.split(" ")]

    def describe(self, medium: Medium) -> str:
        sampling = {"count": 2} if medium.kind == "video" else {}
        decoded = decode(medium.kind, medium.path, **sampling)
        self.decoded.append(decoded)
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
def served(engine: Any, folder: Path, api_key: str | None = None, **options: Any):
    """(address, app) of a server in a thread, configured as `finetune serve` does."""
    from finetune.serving.http.app import build_app
    from finetune.serving.http.settings import ServerOptions
    from finetune.serving.serve import address, listening_socket, uvicorn_server

    server_options = ServerOptions(**options)
    app = build_app(engine, server_options, folder, api_key)
    server = uvicorn_server(app, server_options)
    with listening_socket("127.0.0.1", 0) as listener:
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
    """(status, headers in lower case, JSON or text) of one request; POST if there is a body, JSON or bytes."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request("GET" if body is None else "POST", path, content, headers)
        response = connection.getresponse()
        text = response.read().decode()
        lower = {name.lower(): value for name, value in response.getheaders()}
        return response.status, lower, json.loads(text) if lower.get("content-type") == "application/json" else text
    finally:
        connection.close()
