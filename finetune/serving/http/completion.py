"""OpenAI's chat completion object, whole or as server-sent events, from the engine's streams."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from finetune.common.errors import DataError
from finetune.serving.engine.answer_stream import AnswerStream
from finetune.serving.engine.contract import AnswerPiece, Busy, Request, TimedOut
from finetune.serving.http.protocol import ApiError, ChatRequest, JsonObject, logprobs_of, new_id, now, usage_of

if TYPE_CHECKING:
    from finetune.serving.engine.engine import BatchingEngine

STREAM_ERRORS = (DataError, Busy, TimedOut, MemoryError)  # that reading a stream may raise


class ChatCompletion:
    """One stream per answer. `seconds`: after this time the engine is considered hung.

    Raises Busy and DataError, as the engine does, with all streams cancelled.
    """

    def __init__(
        self, engine: "BatchingEngine", chat: ChatRequest, requests: Sequence[Request], seconds: float
    ) -> None:
        self.chat, self.model, self.seconds = chat, requests[0].model, seconds
        self.head: JsonObject = {"id": new_id("chatcmpl"), "created": now(), "model": self.model}
        self.streams: list[AnswerStream] = []
        self.ended = False
        self._reading: dict[asyncio.Future[AnswerPiece], int] = {}
        self._first: list[tuple[int, AnswerPiece]] = []
        try:
            for request in requests:
                self.streams.append(engine.submit(request))
        except (Busy, DataError):
            self.close()
            raise
        self._pieces = self._merged()

    def close(self) -> None:
        """Cancel the answers that haven't ended."""
        for task in self._reading:
            if not task.cancel() and not task.cancelled():
                task.exception()  # retrieved, so that asyncio doesn't log it
        for stream in self.streams:
            stream.cancel()

    async def start(self) -> None:
        """Wait for the first piece; errors of the request are raised here."""
        self._first = [await anext(self._pieces)]

    async def content(self) -> JsonObject:
        """The whole answer."""
        answers: list[list[AnswerPiece]] = [[] for _ in self.streams]
        async for number, piece in self._all():
            answers[number].append(piece)
        return {
            **self.head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": number,
                    "message": {"role": "assistant", "content": "".join(p.text for p in pieces), "refusal": None},
                    "logprobs": logprobs_of([t for p in pieces for t in p.tokens]) if self.chat.logprobs else None,
                    "finish_reason": pieces[-1].finish_reason,
                }
                for number, pieces in enumerate(answers)
            ],
            "usage": usage_of(self.streams),
        }

    async def events(self, error_of: Callable[[BaseException], ApiError]) -> AsyncIterator[str]:
        """Server-sent events; one of STREAM_ERRORS becomes the last event."""
        with_usage = bool(self.chat.stream_options and self.chat.stream_options.include_usage)
        no_usage: JsonObject = {"usage": None} if with_usage else {}
        for number in range(len(self.streams)):
            yield self._chunk([_choice(number, {"role": "assistant", "content": ""})], no_usage)
        try:
            async for number, piece in self._all():
                if not (piece.text or piece.tokens or piece.finish_reason):
                    continue
                logprobs = logprobs_of(piece.tokens) if self.chat.logprobs else None
                delta: JsonObject = {"content": piece.text} if piece.text else {}
                yield self._chunk([_choice(number, delta, logprobs, piece.finish_reason)], no_usage)
        except STREAM_ERRORS as error:
            yield _event(error_of(error).content())
            return
        if with_usage:
            yield self._chunk([], {"usage": usage_of(self.streams)})
        yield "data: [DONE]\n\n"

    def _chunk(self, choices: list[JsonObject], usage: JsonObject) -> str:
        return _event({**self.head, "object": "chat.completion.chunk", "choices": choices, **usage})

    async def _all(self) -> AsyncIterator[tuple[int, AnswerPiece]]:
        for first in self._first:
            yield first
        async for numbered in self._pieces:
            yield numbered

    async def _merged(self) -> AsyncIterator[tuple[int, AnswerPiece]]:
        """(number of the answer, its next piece) in order of arrival."""
        end = asyncio.get_running_loop().time() + self.seconds
        iterators = [aiter(stream) for stream in self.streams]
        self._reading = {asyncio.ensure_future(anext(one)): number for number, one in enumerate(iterators)}
        try:
            while self._reading:
                left = max(0.0, end - asyncio.get_running_loop().time())
                done, _ = await asyncio.wait(self._reading, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    raise TimedOut(f"no complete answer after {self.seconds:.0f} s")
                for task in done:
                    number = self._reading.pop(task)
                    try:
                        piece = task.result()
                    except StopAsyncIteration:
                        continue
                    self._reading[asyncio.ensure_future(anext(iterators[number]))] = number
                    yield number, piece
        except STREAM_ERRORS:
            self.ended = True
            raise
        self.ended = True


def _choice(
    number: int, delta: JsonObject, logprobs: JsonObject | None = None, finish_reason: str | None = None
) -> JsonObject:
    return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _event(content: JsonObject) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
