"""The HTTP app in front of an engine: OpenAI's API, two endpoints for heads, a chat page, health and metrics."""

import asyncio
import math
from collections.abc import Coroutine
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from finetune.common.errors import DataError
from finetune.data.sample import Answer
from finetune.serving.engine.contract import Busy, Engine, TimedOut
from finetune.serving.http.answers import Chat
from finetune.serving.http.gate import Gate
from finetune.serving.http.intake import Intake, read_chat, read_heads
from finetune.serving.http.metrics import Counted, Metrics
from finetune.serving.http.page import page
from finetune.serving.http.protocol import ApiError, new_id, now
from finetune.serving.http.settings import Options

T = TypeVar("T")
GRACE_SECONDS = 5.0  # the engine keeps the time itself; after so much more it is given up
GONE = 499  # nobody reads it
SSE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Gone(Exception):
    """The client has gone away."""


def build_app(engine: Engine, options: Options, folder: Path, api_key: str | None = None) -> FastAPI:
    """`folder`: private, for media of requests while they are answered. `app.state.server.draining = True` makes it
    refuse what is new. The engine must have been started.
    """
    server = Server(engine, options, folder)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server
    routes: dict[str, tuple[str, Any]] = {
        "/": ("GET", server.chat_page),
        "/health": ("GET", server.health),
        "/metrics": ("GET", server.metrics_text),
        "/v1/models": ("GET", server.models),
        "/v1/models/{name:path}": ("GET", server.model),
        "/v1/chat/completions": ("POST", server.chat),
        "/v1/classify": ("POST", server.classify),
        "/v1/score": ("POST", server.score),
    }
    for path, (method, endpoint) in routes.items():
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    for kind in (ApiError, Busy, TimedOut, MemoryError, HTTPException, Gone, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(Gate, api_key=api_key, origins=options.origins)
    if options.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    app.add_middleware(Counted, metrics=server.metrics, paths=tuple(routes))
    return app


class Server:
    """What the endpoints do."""

    def __init__(self, engine: Engine, options: Options, folder: Path) -> None:
        self.engine, self.options, self.folder = engine, options, folder
        self.metrics = Metrics(engine.stats)
        self.begin = now()
        self.draining = False

    async def chat_page(self) -> Response:
        html, headers = page()
        return HTMLResponse(html, headers=headers)

    async def health(self) -> Response:
        status = "draining" if self.draining else "ok" if self.engine.alive else "failed"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics_text(self) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.engine.models]})

    async def model(self, name: str) -> Response:
        if name not in self.engine.models:
            there = ", ".join(self.engine.models)
            raise ApiError(404, f"there is no {name[:100]!r}; served are {there}", code="model_not_found")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        about = self.engine.models[name]
        return {
            "id": name,
            "object": "model",
            "created": self.begin,
            "owned_by": "finetune",
            "max_model_len": about["context"],
            "media": list(about["media"]),
            "tasks": {task: dict(its) for task, its in about["tasks"].items()},
        }

    async def chat(self, request: Request) -> Response:
        begin = perf_counter()
        body = await self._body(request)
        with ExitStack() as stack:
            intake = Intake(self.options, self.folder)
            stack.callback(intake.close)
            asked, wanted = await run_in_threadpool(read_chat, body, self.engine.models, self.options, intake)
            try:
                chat = Chat(self.engine, asked, wanted, self.options.timeout_seconds + GRACE_SECONDS)
                stack.callback(self._close, chat)
                await while_connected(request, chat.first())
                self.metrics.first_seconds.labels(chat.model).observe(perf_counter() - begin)
                if not asked.stream:
                    return JSONResponse(await while_connected(request, chat.content()))
            except DataError as error:
                raise ApiError(400, intake.told(error)) from None
            told = lambda error: api_error(error, intake)  # noqa: E731
            return _Held(chat.events(told), stack.pop_all())

    def _close(self, chat: Chat) -> None:
        chat.close()
        self.metrics.count(chat.model, chat.streams)
        if not chat.ended:
            self.metrics.stopped.labels(chat.model).inc()

    async def classify(self, request: Request) -> Response:
        return await self._heads(request, "labels")

    async def score(self, request: Request) -> Response:
        return await self._heads(request, "score")

    async def _heads(self, request: Request, heads: str) -> Response:
        body = await self._body(request)
        with ExitStack() as stack:
            intake = Intake(self.options, self.folder)
            stack.callback(intake.close)
            model, task, questions = await run_in_threadpool(
                read_heads, body, self.engine.models, self.options, intake, heads
            )
            try:
                found = [
                    await while_connected(request, self.engine.ask(model, task, question, self.options.timeout_seconds))
                    for question in questions
                ]
            except DataError as error:
                raise ApiError(400, intake.told(error)) from None
        reply = _labels if heads == "labels" else _number
        return JSONResponse(
            {
                "id": new_id("classify" if heads == "labels" else "score"),
                "object": "list",
                "created": now(),
                "model": model,
                "task": task,
                "data": [{"index": number, **reply(answer)} for number, answer in enumerate(found)],
            }
        )

    async def _body(self, request: Request) -> bytes:
        """Raises ApiError while draining, for too much, and for what doesn't come."""
        if self.draining:
            raise ApiError(503, "the server is about to end; ask another", retry_after=5)
        most = self.options.max_request_bytes
        content = bytearray()
        try:
            async with asyncio.timeout(self.options.body_seconds):
                async for chunk in request.stream():
                    content += chunk
                    if len(content) > most:
                        raise ApiError(413, f"more than {most:,} bytes in one request (`max_request_bytes`)")
        except TimeoutError:
            raise ApiError(408, f"the request wasn't there after {self.options.body_seconds:g} s") from None
        except ClientDisconnect:
            raise Gone from None
        return bytes(content)


class _Held(StreamingResponse):
    """Events; what they hold is let go of when the last is sent, or the reader goes away."""

    def __init__(self, events: Any, held: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers=SSE)
        self.held = held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self.held:
            await super().__call__(scope, receive, send)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives. Raises Gone, and ends `work`, where the client goes away first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


def _labels(answer: Answer) -> dict[str, Any]:
    chances = dict(answer.probabilities or {})
    label = answer.text or max(chances, key=chances.__getitem__)
    return {"label": label, "probs": list(chances.values()), "num_classes": len(chances), "probabilities": chances}


def _number(answer: Answer) -> dict[str, Any]:
    number = answer.number
    return {"object": "score", "score": number if number is not None and math.isfinite(number) else None}


def api_error(error: BaseException, intake: Intake | None = None) -> ApiError:
    """What a client is told; of what isn't its affair only that there was something."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="busy", retry_after=max(1, math.ceil(error.retry_after_seconds)))
    if isinstance(error, TimedOut):
        return ApiError(504, str(error) or "the answer took too long", code="timeout")
    if isinstance(error, MemoryError):
        return ApiError(503, "out of memory: fewer or smaller media, or shorter text", retry_after=5)
    if isinstance(error, DataError) and intake is not None:
        return ApiError(400, intake.told(error))
    if isinstance(error, HTTPException):
        wrong = ApiError(error.status_code, f"{error.detail}; the endpoints are under /v1")
        wrong.headers = dict(error.headers or {})
        return wrong
    return ApiError(500, "the server failed; its log tells more")


async def _answer_error(_: Request, error: Exception) -> Response:
    if isinstance(error, Gone):
        return Response(status_code=GONE)
    told = api_error(error)
    return JSONResponse(told.content(), told.status, told.headers)
