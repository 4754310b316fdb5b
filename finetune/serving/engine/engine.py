"""The engine: requests come in from any thread, readers read them, the worker answers, event loops are told."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from finetune.common.errors import DataError
from finetune.data.sample import Answer, Message
from finetune.model.assistant import Assistant
from finetune.model.language_model import context_length
from finetune.model.tokenize import answer_ends
from finetune.serving.engine.batch import Batch
from finetune.serving.engine.cache import Kept, PrefixCache
from finetune.serving.engine.contract import Busy, Request, Stats, TimedOut
from finetune.serving.engine.reading import InFlight, Media, looked_at, read_prompt
from finetune.serving.engine.row import Row
from finetune.serving.engine.sampling import Vocabulary
from finetune.serving.engine.stream import Stream
from finetune.serving.engine.worker import STOPPED, Question, Served, Worker

READERS = 2  # threads that decode and tokenize
MEBIBYTE = 2**20


class Engine:
    """Serves `assistants` by name; `paths` tells where they came from.

    max_batch: rows of a model that are decoded together
    max_batch_tokens: tokens of these rows, padding, prompts and answers; no request may need more
    prefill_tokens: prompt tokens of newcomers that are read between two steps; one alone may have more
    queue_limit: requests that may wait
    media_cache_bytes, prefix_cache_bytes: kept of media, and of prompts' beginnings; 0 keeps nothing
    media_waiting_bytes: of media that are decoded and not encoded yet; readers that find so much there say Busy
    """

    def __init__(
        self,
        assistants: Mapping[str, Assistant],
        *,
        paths: Mapping[str, str] | None = None,
        max_batch: int = 32,
        max_batch_tokens: int = 65_536,
        prefill_tokens: int = 4096,
        queue_limit: int = 128,
        media_cache_bytes: int = 256 * MEBIBYTE,
        prefix_cache_bytes: int = 256 * MEBIBYTE,
        media_waiting_bytes: int = 1024 * MEBIBYTE,
    ) -> None:
        self._features, self._prefixes = Kept(media_cache_bytes), PrefixCache(prefix_cache_bytes)
        self._flying = InFlight(media_waiting_bytes)
        self._queue_limit = queue_limit
        self._served: dict[str, Served] = {}
        self._worker = Worker(self._prefixes, max_batch, max_batch_tokens, prefill_tokens)
        for name, assistant in assistants.items():
            self._served[name] = self._serving(assistant, max_batch)
        self._worker.served = list(self._served.values())
        self.models = {name: _told_of(assistant, (paths or {}).get(name)) for name, assistant in assistants.items()}
        self._readers = ThreadPoolExecutor(READERS, "reader")

    def _serving(self, assistant: Assistant, max_batch: int) -> Served:
        model = assistant.model
        media = Media(assistant, self._features, self._flying, self._worker.counters)
        joins = model.shares_memory() and model.fusion.strength is None
        return Served(
            assistant,
            media,
            Batch(model, self._prefixes),
            frozenset(answer_ends(assistant.tokenizer, model.causal_lm.generation_config)),
            weights=None if model.fusion.strength is None else dict(model.fusion.strength),
            together=0 if joins else max_batch if model.shares_memory() else 1,
            room=max_batch,
        )

    def start(self) -> None:
        self._worker.start()

    @property
    def alive(self) -> bool:
        """Whether it answers: it has been started, and its worker hasn't ended."""
        return self._worker.alive

    def submit(self, request: Request) -> Stream:
        """Raises Busy, and DataError for an unknown model or numbers out of range."""
        served = self._find(request.model)
        _check(request)
        weights = served.assistant.strengths(request.strength, served.weights)
        self._admit()
        stream = Stream(request.timeout_seconds, self._worker.notify)

        def read() -> None:
            served.ready.append(self._row(served, request, stream, weights))

        self._readers.submit(self._reading, read, stream.fail, lambda: stream.cancelled)
        return stream

    async def ask(self, model: str, task: str, messages: tuple[Message, ...], timeout_seconds: float) -> Answer:
        """What `task`'s head says. Raises Busy, TimedOut, DataError."""
        served = self._find(model)
        if task not in served.assistant.model.asks:
            there = ", ".join(served.assistant.model.asks) or "none"
            raise DataError(f"the model {model!r} knows no task {task!r}; there are: {there}")
        self._admit()
        question = Question(task, messages)

        def read() -> None:
            question.look = looked_at(served.media, messages)
            served.questions.append(question)

        self._readers.submit(self._reading, read, question.fail, question.future.done)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(question.future), timeout_seconds)
        except TimeoutError:
            raise TimedOut(f"no answer within {timeout_seconds:g} s") from None

    def stats(self) -> Stats:
        gauges = {
            "requests_running": sum(len(served.running) for served in self._served.values()),
            "requests_waiting": self._worker.waiting,
            "media_waiting_bytes": self._flying.bytes(),
            "media_cache_bytes": self._features.bytes,
            "prefix_cache_bytes": self._prefixes.kept.bytes,
        }
        return Stats(dict(self._worker.counters), gauges)

    def stop(self, drain_seconds: float) -> None:
        """Take nothing new, finish what is there within the time, then end."""
        self._worker.stop(drain_seconds)
        self._readers.shutdown()
        self._worker.abandon()

    def _find(self, model: str) -> Served:
        if model not in self._served:
            raise DataError(f"no model is called {model!r} here; there are: {', '.join(self._served)}")
        return self._served[model]

    def _admit(self) -> None:
        worker = self._worker
        with worker.wake:
            if worker.draining or worker.waiting >= self._queue_limit:
                worker.counters["requests_refused"] += 1
                rounds = 1 + worker.waiting // worker.max_batch
                raise Busy(max(1.0, rounds * worker.seconds))
            worker.waiting += 1
            worker.counters["requests"] += 1

    def _reading(
        self, read: Callable[[], None], fail: Callable[[BaseException], Any], gone: Callable[[], bool]
    ) -> None:
        """In a reader's thread: `read` puts a request to what is ready for the worker, or it fails alone."""
        if gone():
            self._worker.wait_less()
            self._worker.counters["requests_cancelled"] += 1
            self._worker.notify()
            return
        try:
            if self._worker.stopped:
                raise STOPPED
            read()
        except Exception as error:  # whatever a foreign file does to a decoder: who sent it is told
            self._worker.wait_less()
            self._worker.failed(error, fail)
        self._worker.notify()

    def _row(self, served: Served, request: Request, stream: Stream, weights: dict[str, float]) -> Row:
        assistant = served.assistant
        room = self._worker.max_batch_tokens
        prompt = read_prompt(assistant, served.media, request.messages, weights, room)
        room = min(room, context_length(assistant.model.causal_lm) or room)
        return Row(
            request,
            stream,
            prompt,
            limit=min(request.max_new_tokens, room - len(prompt.input_ids)),
            ends=served.ends,
            tokenizer=assistant.tokenizer,
            vocabulary=self._vocabulary(served) if request.schema is not None or request.logprobs is not None else None,
            weights=weights,
        )

    def _vocabulary(self, served: Served) -> Vocabulary:
        served.vocabulary = served.vocabulary or Vocabulary(served.assistant.tokenizer, sorted(served.ends))
        return served.vocabulary


def _check(request: Request) -> None:
    """Raises DataError for numbers out of range."""
    wrong = {
        "max_new_tokens": (request.max_new_tokens >= 1, "1 or more"),
        "temperature": (0 <= request.temperature < float("inf"), "0 or more"),
        "top_p": (0 < request.top_p <= 1, "more than 0, up to 1"),
        "logprobs": (request.logprobs is None or request.logprobs >= 0, "0 or more"),
        "timeout_seconds": (request.timeout_seconds > 0, "more than 0"),
        "messages": (bool(request.messages), "at least one"),
    }
    for name, (right, what) in wrong.items():
        if not right:
            raise DataError(f"{name} is {getattr(request, name)}; write {what}")


def _told_of(assistant: Assistant, path: str | None) -> dict[str, Any]:
    tasks = {
        name: {"head": ask.head[0], "labels": list(ask.settings.labels) or None}
        for name, ask in assistant.model.asks.items()
    }
    return {
        "media": tuple(assistant.encoders),
        "tasks": tasks,
        "context": context_length(assistant.model.causal_lm),
        "path": path,
    }
