"""The answers to one request while they are written, as OpenAI's client reads them: whole, or event by event."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.common.errors import DataError
from finetune.serving.engine.contract import Busy, Engine, Piece, Request, Stream, TimedOut, Token
from finetune.serving.http.protocol import ApiError, ChatRequest, logprobs_of, new_id, now, usage

# What reading a stream may raise; the text of a DataError is the client's affair.
RAISED = (DataError, Busy, TimedOut, MemoryError)


@dataclass
class _Choice:
    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None


class Chat:
    """One stream of the engine for each answer. `seconds`: after so many without an end the engine is given up.

    Raises Busy and DataError, as the engine does, with nothing left behind.
    """

    def __init__(self, engine: Engine, asked: ChatRequest, wanted: Sequence[Request], seconds: float) -> None:
        self.asked, self.model, self.seconds = asked, wanted[0].model, seconds
        self.head = {"id": new_id("chatcmpl"), "created": now(), "model": self.model}
        self.streams: list[Stream] = []
        self.ended = False
        self._reading: dict[asyncio.Future[Piece], int] = {}
        self._early: list[tuple[int, Piece]] = []
        try:
            for one in wanted:
                self.streams.append(engine.submit(one))
        except (Busy, DataError):
            self.close()
            raise
        self._pieces = self._merged()

    def close(self) -> None:
        """Stop what is still being written."""
        for task in self._reading:
            if not task.cancel() and not task.cancelled():
                task.exception()  # of an answer beside one that failed: seen, so that asyncio doesn't tell of it
        for stream in self.streams:
            stream.cancel()

    async def first(self) -> None:
        """Wait for the first piece: what is wrong with a request shows by then."""
        self._early = [await anext(self._pieces)]

    async def content(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [_Choice() for _ in self.streams]
        async for number, piece in self._all():
            choices[number].text.append(piece.text)
            choices[number].tokens.extend(piece.tokens)
            choices[number].finish_reason = piece.finish_reason or choices[number].finish_reason
        return {
            **self.head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": number,
                    "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
                    "logprobs": logprobs_of(choice.tokens) if self.asked.logprobs else None,
                    "finish_reason": choice.finish_reason or "stop",
                }
                for number, choice in enumerate(choices)
            ],
            "usage": usage(self.streams),
        }

    async def events(self, told: Any) -> AsyncIterator[str]:
        """Server-sent events. `told`: what a client is told of an error of RAISED, as ApiError."""
        with_usage = bool(self.asked.stream_options and self.asked.stream_options.include_usage)
        rest = {"usage": None} if with_usage else {}
        for number in range(len(self.streams)):
            yield self._event([_delta(number, {"role": "assistant", "content": ""})], rest)
        try:
            async for number, piece in self._all():
                if not (piece.text or piece.tokens or piece.finish_reason):
                    continue
                logprobs = logprobs_of(piece.tokens) if self.asked.logprobs else None
                delta = {"content": piece.text} if piece.text else {}
                yield self._event([_delta(number, delta, logprobs, piece.finish_reason)], rest)
        except RAISED as error:
            failed: ApiError = told(error)
            yield _line(failed.content())
            return
        if with_usage:
            yield self._event([], {"usage": usage(self.streams)})
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], rest: dict[str, Any]) -> str:
        return _line({**self.head, "object": "chat.completion.chunk", "choices": choices, **rest})

    async def _all(self) -> AsyncIterator[tuple[int, Piece]]:
        for early in self._early:
            yield early
        async for late in self._pieces:
            yield late

    async def _merged(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the answer, its next piece) as they come."""
        end = asyncio.get_running_loop().time() + self.seconds
        sources = [aiter(stream) for stream in self.streams]
        self._reading = {asyncio.ensure_future(anext(source)): number for number, source in enumerate(sources)}
        try:
            while self._reading:
                left = max(0.0, end - asyncio.get_running_loop().time())
                done, _ = await asyncio.wait(self._reading, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    raise TimedOut(f"no end after {self.seconds:.0f} s")
                for task in done:
                    number = self._reading.pop(task)
                    try:
                        piece = task.result()
                    except StopAsyncIteration:
                        continue
                    self._reading[asyncio.ensure_future(anext(sources[number]))] = number
                    yield number, piece
        except RAISED:
            self.ended = True
            raise
        self.ended = True


def _delta(
    number: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
