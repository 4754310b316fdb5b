"""The HTTP app in front of an engine: OpenAI's API, two endpoints for heads, a chat page, health and metrics."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from finetune.common.errors import DataError
from finetune.data.sample import Answer
from finetune.serving.engine.contract import Busy, TimedOut
from finetune.serving.http.access import AccessControl
from finetune.serving.http.completion import ChatCompletion
from finetune.serving.http.metrics import RequestMetrics, ServerMetrics
from finetune.serving.http.page import page
from finetune.serving.http.protocol import ApiError, ApiRequest, ChatRequest, HeadRequest, JsonObject, new_id, now
from finetune.serving.http.reader import HeadOutput, RequestReader
from finetune.serving.http.schema import body_of, openapi
from finetune.serving.http.settings import ServerOptions

if TYPE_CHECKING:
    from finetune.serving.engine.engine import BatchingEngine

T = TypeVar("T")
GRACE_SECONDS = 5.0  # the engine observes the time limit itself; after this much more it is considered hung
CLIENT_CLOSED_REQUEST = 499  # as in nginx: nobody reads it
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def build_app(engine: "BatchingEngine", options: ServerOptions, folder: Path, api_key: str | None = None) -> FastAPI:
    """The app for an engine that has been started. `folder`: private, for the media of requests in progress.
    `app.state.server.draining = True` makes it refuse new requests.
    """
    server = HttpServer(engine, options, folder)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server

    async def schema() -> Response:
        return JSONResponse(openapi(app.routes))

    routes: dict[str, tuple[Callable[..., Awaitable[Response]], type[ApiRequest] | None]] = {
        "/": (server.chat_page, None),
        "/health": (server.health, None),
        "/metrics": (server.metrics_text, None),
        "/openapi.json": (schema, None),
        "/v1/models": (server.models, None),
        "/v1/models/{name:path}": (server.model, None),
        "/v1/chat/completions": (server.chat, ChatRequest),
        "/v1/classify": (server.classify, HeadRequest),
        "/v1/score": (server.score, HeadRequest),
    }
    for path, (endpoint, takes) in routes.items():
        method, extra = ("POST", body_of(takes)) if takes else ("GET", None)
        app.add_api_route(path, endpoint, methods=[method], response_model=None, openapi_extra=extra)
    for kind in (ApiError, Busy, TimedOut, MemoryError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _error_response)
    app.add_middleware(AccessControl, api_key=api_key, origins=options.origins)
    if options.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    app.add_middleware(RequestMetrics, metrics=server.metrics, paths=tuple(routes))
    return app


class HttpServer:
    def __init__(self, engine: "BatchingEngine", options: ServerOptions, folder: Path) -> None:
        self.engine, self.options, self.folder = engine, options, folder
        self.metrics = ServerMetrics(engine.stats)
        self.started = now()
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
            names = ", ".join(self.engine.models)
            raise ApiError(404, f"there is no {name[:100]!r}; served are {names}", code="model_not_found")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> JsonObject:
        info = self.engine.models[name]
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "finetune",
            "max_model_len": info.context,
            "media": info.media,
            "tasks": {task: asdict(about) for task, about in info.tasks.items()},
        }

    async def chat(self, request: Request) -> Response:
        begin = perf_counter()
        body = await self._body(request)
        with ExitStack() as stack:
            reader = stack.enter_context(self._reader())
            try:
                chat, requests = await run_in_threadpool(reader.chat, body)
                seconds = self.options.timeout_seconds + GRACE_SECONDS
                completion = ChatCompletion(self.engine, chat, requests, seconds)
                stack.callback(self._close, completion)
                await while_connected(request, completion.start())
                self.metrics.first_seconds.labels(completion.model).observe(perf_counter() - begin)
                if not chat.stream:
                    return JSONResponse(await while_connected(request, completion.content()))
            except DataError as error:
                raise reader.api_error(error) from None
            return _EventStream(completion.events(partial(api_error, reader=reader)), stack.pop_all())

    def _close(self, completion: ChatCompletion) -> None:
        completion.close()
        self.metrics.count_tokens(completion.model, completion.streams)
        if not completion.ended:
            self.metrics.stopped.labels(completion.model).inc()

    async def classify(self, request: Request) -> Response:
        return await self._heads(request, "labels")

    async def score(self, request: Request) -> Response:
        return await self._heads(request, "score")

    async def _heads(self, request: Request, output: HeadOutput) -> Response:
        body = await self._body(request)
        seconds = self.options.timeout_seconds
        with self._reader() as reader:
            try:
                questions = await run_in_threadpool(reader.heads, body, output)
                model, task = questions.model, questions.task
                answers = [
                    await while_connected(request, self.engine.ask(model, task, messages, seconds))
                    for messages in questions.conversations
                ]
            except DataError as error:
                raise reader.api_error(error) from None
        prefix, entry = ("classify", _label_entry) if output == "labels" else ("score", _score_entry)
        return JSONResponse(
            {
                "id": new_id(prefix),
                "object": "list",
                "created": now(),
                "model": model,
                "task": task,
                "data": [{"index": number, **entry(answer)} for number, answer in enumerate(answers)],
            }
        )

    @contextmanager
    def _reader(self) -> Iterator[RequestReader]:
        """A reader of one request, whose media are deleted at the end of the block."""
        with TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as folder:
            yield RequestReader(self.engine.models, self.options, Path(folder))

    async def _body(self, request: Request) -> bytes:
        """Raises ApiError while draining, for a body that is too large, and for one that doesn't arrive in time."""
        if self.draining:
            raise ApiError(503, "the server is shutting down; send the request to another", retry_after=5)
        most = self.options.max_request_bytes
        content = bytearray()
        try:
            async with asyncio.timeout(self.options.body_seconds):
                async for chunk in request.stream():
                    content += chunk
                    if len(content) > most:
                        raise ApiError(413, f"more than {most:,} bytes in one request (`max_request_bytes`)")
        except TimeoutError:
            raise ApiError(408, f"the body didn't arrive within {self.options.body_seconds:g} s") from None
        return bytes(content)


class _EventStream(StreamingResponse):
    """Server-sent events; `resources` are closed after the last one, or when the client disconnects."""

    def __init__(self, events: AsyncIterator[str], resources: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers=SSE_HEADERS)
        self.resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.resources:
            await super().__call__(scope, receive, send)


async def while_connected(request: Request, work: Coroutine[object, object, T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects first. Raises ClientDisconnect."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


def _label_entry(answer: Answer) -> JsonObject:
    probabilities = dict(answer.probabilities or {})
    return {
        "label": answer.text or max(probabilities, key=probabilities.__getitem__),
        "probs": list(probabilities.values()),
        "num_classes": len(probabilities),
        "probabilities": probabilities,
    }


def _score_entry(answer: Answer) -> JsonObject:
    number = answer.number
    return {"object": "score", "score": number if number is not None and math.isfinite(number) else None}


def api_error(error: BaseException, reader: RequestReader | None = None) -> ApiError:
    """The error as the client gets it; without details if the client isn't the cause."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="busy", retry_after=max(1, math.ceil(error.retry_after_seconds)))
    if isinstance(error, TimedOut):
        return ApiError(504, str(error) or "the answer took too long", code="timeout")
    if isinstance(error, MemoryError):
        return ApiError(503, "out of memory: send fewer or smaller media, or shorter text", retry_after=5)
    if isinstance(error, DataError) and reader is not None:
        return reader.api_error(error)
    if isinstance(error, HTTPException):
        wrong = ApiError(error.status_code, f"{error.detail}; the endpoints are under /v1")
        wrong.headers = dict(error.headers or {})
        return wrong
    return ApiError(500, "the server failed; see its log")


async def _error_response(_: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    reported = api_error(error)
    return JSONResponse(reported.content(), reported.status, reported.headers)
