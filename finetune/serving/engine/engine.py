"""The engine behind the HTTP app: reader threads prepare requests, one worker thread runs the models, and answers go
back to event loops.
"""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from finetune.common.errors import DataError
from finetune.data.sample import Answer, Message
from finetune.model.assistant import Assistant
from finetune.model.language_model import context_length
from finetune.model.tokenize import answer_ends
from finetune.serving.engine.answer_stream import AnswerStream
from finetune.serving.engine.batch import GenerationBatch
from finetune.serving.engine.cache import PrefixCache
from finetune.serving.engine.contract import EngineLimits, ModelInfo, Request, Stats, TaskInfo, TimedOut
from finetune.serving.engine.generation import Generation
from finetune.serving.engine.prompt import DecodedMedia, FeatureCache, MediaPool, MediaReader, read_prompt
from finetune.serving.engine.sampling import Vocabulary
from finetune.serving.engine.text import IncrementalDecoder
from finetune.serving.engine.worker import STOPPED, Fail, HeadQuery, HostedModel, Worker

READERS = 2  # threads that decode and tokenize


class BatchingEngine:
    """Answers of `assistants`, by name; those of one model are generated together."""

    def __init__(self, assistants: Mapping[str, Assistant], limits: EngineLimits | None = None) -> None:
        self.limits = limits or EngineLimits()
        self._features = FeatureCache(self.limits.media_cache_bytes)
        self._pool = MediaPool(self.limits.media_waiting_bytes)
        self._prefixes = PrefixCache(self.limits.prefix_cache_bytes)
        self._worker = Worker(self._prefixes, self.limits)
        self._hosted = {name: self._host(assistant) for name, assistant in assistants.items()}
        self._worker.models = list(self._hosted.values())
        self.models = {name: _model_info(assistant) for name, assistant in assistants.items()}
        self._readers = ThreadPoolExecutor(READERS, "reader")

    def _host(self, assistant: Assistant) -> HostedModel:
        model, most = assistant.model, self.limits.max_batch
        joins_later = model.shares_memory and model.fusion.strength is None and model.reads_plainly
        return HostedModel(
            assistant,
            MediaReader(assistant, self._features, self._pool, self._worker.count),
            GenerationBatch(model, self._prefixes),
            frozenset(answer_ends(assistant.tokenizer, model.causal_lm.generation_config)),
            strengths=None if model.fusion.strength is None else dict(model.fusion.strength),
            batch_size=most,
            static=0 if joins_later else most if model.shares_memory else 1,
        )

    def start(self) -> None:
        self._worker.start()

    @property
    def alive(self) -> bool:
        """Whether it has been started and its worker is running."""
        return self._worker.alive

    def submit(self, request: Request) -> AnswerStream:
        """Raises Busy; DataError for an unknown model or an invalid strength."""
        model = self._model(request.model)
        strengths = model.assistant.strengths(request.strength, model.strengths)
        stream = AnswerStream(request.timeout_seconds, self._worker.notify)
        self._worker.accept(stream)

        def read() -> None:
            self._worker.deliver(model, self._generation(model, request, stream, strengths), stream)

        self._readers.submit(self._read, stream, read, stream.put, lambda: stream.cancelled)
        return stream

    async def ask(self, model: str, task: str, messages: tuple[Message, ...], timeout_seconds: float) -> Answer:
        """The output of `task`'s labels or score head. Raises Busy, TimedOut, DataError."""
        hosted = self._model(model)
        if task not in self.models[model].tasks:
            tasks = ", ".join(self.models[model].tasks) or "none"
            raise DataError(f"the model {model!r} has no task {task!r}; there are: {tasks}")
        query = HeadQuery(task, messages)
        self._worker.accept(query)

        def read() -> None:
            query.view = DecodedMedia(hosted.media, messages)
            self._worker.deliver(hosted, query, query)

        self._readers.submit(self._read, query, read, query.fail, query.future.done)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(query.future), timeout_seconds)
        except TimeoutError:
            raise TimedOut(f"no answer within {timeout_seconds:g} s") from None

    def stats(self) -> Stats:
        gauges = {
            "requests_running": sum(len(model.running) for model in self._hosted.values()),
            "requests_waiting": self._worker.waiting,
            "media_waiting_bytes": self._pool.waiting_bytes(),
            "media_cache_bytes": self._features.bytes,
            "prefix_cache_bytes": self._prefixes.blocks.bytes,
        }
        return Stats(dict(self._worker.counters), gauges)

    def stop(self, drain_seconds: float) -> None:
        """Refuse new requests, finish the accepted ones within the time limit, then end."""
        self._worker.stop(drain_seconds)
        self._readers.shutdown()
        self._worker.fail_unanswered()

    def _model(self, name: str) -> HostedModel:
        if name not in self._hosted:
            raise DataError(f"there is no model {name!r}; there are: {', '.join(self._hosted)}")
        return self._hosted[name]

    def _read(self, request: object, read: Callable[[], None], fail: Fail, is_cancelled: Callable[[], bool]) -> None:
        """In a reader thread: `read` delivers an accepted request to the worker, or the request fails."""
        if is_cancelled():
            self._worker.drop(request)
            self._worker.count("requests_cancelled")
            return
        try:
            if self._worker.stopped:
                raise STOPPED
            read()
        except Exception as error:  # whatever a decoder raises for a client's file, the client gets it
            self._worker.drop(request)
            self._worker.fail(error, fail)

    def _generation(
        self, model: HostedModel, request: Request, stream: AnswerStream, strengths: dict[str, float]
    ) -> Generation:
        assistant = model.assistant
        room = self.limits.max_batch_tokens
        prompt = read_prompt(assistant, model.media, request.messages, strengths, room)
        room = min(room, context_length(assistant.model.causal_lm) or room)
        if request.schema is not None or request.logprobs is not None:
            model.vocabulary = model.vocabulary or Vocabulary(assistant.tokenizer, sorted(model.ends))
        return Generation(
            request,
            stream,
            prompt,
            IncrementalDecoder(assistant.tokenizer, request.stop),
            limit=min(request.max_new_tokens, room - len(prompt.input_ids)),
            ends=model.ends,
            strengths=strengths,
            vocabulary=model.vocabulary,
        )


def _model_info(assistant: Assistant) -> ModelInfo:
    tasks = {}
    for name, binding in assistant.model.bindings.items():
        prompt = getattr(binding.task.options, "prompt", "")
        tasks[name] = TaskInfo(binding.head.kind, binding.settings.labels or None, prompt)
    return ModelInfo(tuple(assistant.encoders), tasks, context_length(assistant.model.causal_lm))
