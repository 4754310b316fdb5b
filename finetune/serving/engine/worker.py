"""The thread that owns the models. Model by model in turn, new answers join the model's batch and every answer in it
gets one more token. Between two steps it also runs heads.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from finetune.common.errors import FinetuneError
from finetune.common.memory import is_out_of_memory
from finetune.data.sample import Answer, Message
from finetune.model.assistant import Assistant
from finetune.model.features import MediaView
from finetune.serving.engine import static_batch
from finetune.serving.engine.batch import GenerationBatch
from finetune.serving.engine.cache import PrefixCache
from finetune.serving.engine.contract import Busy, EngineLimits, TimedOut
from finetune.serving.engine.generation import Generation
from finetune.serving.engine.prompt import MediaReader
from finetune.serving.engine.sampling import Vocabulary

COUNTERS = (
    *("requests", "requests_finished", "requests_failed", "requests_cancelled", "requests_refused", "steps"),
    *("prompt_tokens", "completion_tokens", "prefix_cache_hit_tokens", "prefix_cache_miss_tokens"),
    *("media_cache_hits", "media_cache_misses"),
)
OUTCOMES = {"stop": "finished", "length": "finished", "error": "failed", None: "cancelled"}  # of finish reasons
STOPPED = TimedOut("the server stopped before this request was answered")
Fail = Callable[[BaseException], None]


@dataclass(eq=False)
class HeadQuery:
    """A question to a task's labels or score head. `view` is set once its media have been decoded."""

    task: str
    messages: tuple[Message, ...]
    future: "Future[Answer]" = field(default_factory=Future)
    view: MediaView | None = None

    @property
    def done(self) -> bool:
        return self.future.done()

    def fail(self, error: BaseException) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass(eq=False)
class HostedModel:
    """A model, its batch, and what is ready for it; only the worker touches the queues.

    strengths: the default factor of each kind of media; the model's own change while a static batch runs
    batch_size: the most answers at a time; smaller after memory ran out
    static: how many answers may begin together if none can join later (`static_batch`); 0 if they can
    joining: answers that have left `ready` and aren't in the batch yet; those of a static batch never are
    """

    assistant: Assistant
    media: MediaReader
    batch: GenerationBatch
    ends: frozenset[int]
    strengths: dict[str, float] | None
    batch_size: int
    static: int
    ready: deque[Generation] = field(default_factory=deque)
    queries: deque[HeadQuery] = field(default_factory=deque)
    joining: list[Generation] = field(default_factory=list)
    vocabulary: Vocabulary | None = None  # made when first needed: it takes a second

    @property
    def running(self) -> list[Generation]:
        return list(dict.fromkeys([*self.batch.generations, *self.joining]))


class Worker:
    """Reader threads take requests by `accept` and hand them over by `deliver`; all queues behind these are the
    worker's own. `reading`: what has been accepted and not handed over yet, under `wake`.
    """

    def __init__(self, prefixes: PrefixCache, limits: EngineLimits) -> None:
        self.models: Sequence[HostedModel] = ()
        self.prefixes, self.limits = prefixes, limits
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self.seconds = 1.0  # moving average of an answer's duration
        self.wake = threading.Condition()
        self.reading: set[object] = set()
        self.draining = self.stopped = False
        self._inbox: list[tuple[HostedModel, Generation | HeadQuery]] = []  # under `wake`
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, drain_seconds: float) -> None:
        """Finish all accepted requests within the time limit, then end."""
        if self._thread.ident is None:
            return
        with self.wake:
            self.draining = True
            self.wake.notify_all()
        self._thread.join(drain_seconds)
        with self.wake:
            self.stopped = True
            self.wake.notify_all()
        while self._thread.is_alive():  # again and again: an answer may join its batch at this moment
            for model in self.models:
                for generation in model.running:
                    generation.stream.deadline = 0.0
            self._thread.join(0.1)

    @property
    def waiting(self) -> int:
        """Accepted requests that are neither in a batch nor answered, by what is there."""
        with self.wake:
            queued = sum(len(model.ready) + len(model.queries) for model in self.models)
            return len(self.reading) + len(self._inbox) + queued

    def accept(self, request: object) -> None:
        """`request` is to be read. Raises Busy."""
        with self.wake:
            if self.draining or self.waiting >= self.limits.queue_limit:
                self.count("requests_refused")
                rounds = 1 + self.waiting // self.limits.max_batch
                raise Busy(max(1.0, rounds * self.seconds))
            self.reading.add(request)
            self.count("requests")

    def deliver(self, model: HostedModel, item: Generation | HeadQuery, request: object) -> None:
        """Hand over an accepted request that has been read: as `item`."""
        with self.wake:
            self.reading.discard(request)
            self._inbox.append((model, item))
            self.wake.notify_all()

    def drop(self, request: object) -> None:
        """An accepted request that won't be handed over."""
        with self.wake:
            self.reading.discard(request)
            self.wake.notify_all()

    def notify(self) -> None:
        with self.wake:
            self.wake.notify_all()

    def count(self, name: str, number: int = 1) -> None:
        with self.wake:
            self.counters[name] += number

    def fail(self, error: Exception, *requests: Fail) -> None:
        """Report an error to the requests that it concerns, each given by its `fail`."""
        self.count("requests_failed", len(requests))
        reported: Exception = error
        if is_out_of_memory(error):
            reported = MemoryError("not enough memory for this request: send fewer or smaller media, or shorter text")
        elif not isinstance(error, FinetuneError | TimedOut | Busy):
            logging.getLogger(__name__).error("a request failed", exc_info=error)
        for fail in requests:
            fail(reported)

    def fail_unanswered(self) -> None:
        """Report to all requests that are left after the worker has ended."""
        self._receive()
        for model in self.models:
            self.fail(STOPPED, *(one.fail for one in (*model.running, *model.ready) if not one.done))
            self.fail(STOPPED, *(query.fail for query in model.queries))
            model.ready.clear()
            model.queries.clear()

    def _work(self) -> None:
        while self._wait():
            for model in self.models:
                try:
                    self._turn(model)
                except Exception as error:  # whatever a model raises, the worker goes on
                    self._recover(model, error)

    def _wait(self) -> bool:
        """Block until there is something to do; False when the worker is to end."""
        with self.wake:
            self.wake.wait_for(lambda: self.stopped or self._busy() or (self.draining and not self.waiting))
            self._receive()
            return not self.stopped and self._busy()

    def _receive(self) -> None:
        with self.wake:
            for model, item in self._inbox:
                if isinstance(item, Generation):
                    model.ready.append(item)
                else:
                    model.queries.append(item)
            self._inbox.clear()

    def _busy(self) -> bool:
        return bool(self._inbox) or any(m.ready or m.queries or m.batch.generations for m in self.models)

    def _turn(self, model: HostedModel) -> None:
        """One query to a head, new answers, one step."""
        self._tidy(model)
        if model.queries:
            self._answer_query(model, model.queries.popleft())
        self._admit(model)
        if model.joining and model.static:
            static_batch.generate(model.assistant, model.joining)
        elif model.joining:
            model.batch.join(model.joining)
        self._tidy(model)
        if model.batch.generations:
            model.batch.step()
            self.count("steps")
            self._tidy(model)

    def _admit(self, model: HostedModel) -> None:
        """Move answers from `ready` to `joining`, in order, as far as there is room."""
        joining = model.joining
        running, most = model.batch.generations, min(model.batch_size, model.static or model.batch_size)
        while model.ready and len(running) + len(joining) < most:
            new = model.ready[0]
            together = [*running, *joining, new]
            longest = max(len(one.prompt.input_ids) + one.limit for one in together)
            if len(together) > 1 and len(together) * longest > self.limits.max_batch_tokens:
                break
            if joining and sum(one.length for one in (*joining, new)) > self.limits.prefill_tokens:
                break
            if joining and model.static and new.strengths != joining[0].strengths:
                break
            joining.append(model.ready.popleft())
            if not self._encode_media(model, new):
                joining.pop()

    def _encode_media(self, model: HostedModel, generation: Generation) -> bool:
        """Whether its media could be encoded; if not, it fails alone."""
        try:
            for kind, media in generation.prompt.media.items():
                for medium in media:
                    model.media.encode(kind, medium)
        except Exception as error:  # whatever an encoder raises, the worker goes on
            self.fail(error, generation.fail)
        return not generation.done

    def _recover(self, model: HostedModel, error: Exception) -> None:
        """After an error in a batch: an answer that was alone fails; several go back to the queue, to be tried again
        by fewer at a time, so that only those fail that cause the error.
        """
        running = model.running
        model.batch.clear()
        model.joining = []
        self.prefixes.blocks.clear()
        unfinished = [generation for generation in running if not generation.done]
        self._finish(model, [generation for generation in running if generation not in unfinished])
        if len(running) == 1 or not unfinished:
            self.fail(error, *(generation.fail for generation in unfinished))
            return
        model.batch_size = max(1, len(unfinished) // 2) if is_out_of_memory(error) else 1
        model.ready.extendleft(reversed(unfinished))

    def _answer_query(self, model: HostedModel, query: HeadQuery) -> None:
        if not query.future.set_running_or_notify_cancel():
            self.count("requests_cancelled")
            return
        try:
            (answer,) = model.assistant.ask(query.task, [query.messages], view=query.view)
        except Exception as error:  # as above
            self.fail(error, query.future.set_exception)
            return
        self.count("requests_finished")
        query.future.set_result(answer)

    def _tidy(self, model: HostedModel) -> None:
        """Drop what has ended or was cancelled."""
        for generation in (*model.running, *model.ready):
            generation.check_deadline()
        ended = [generation for generation in model.running if generation.done]
        model.batch.keep([generation for generation in model.batch.generations if generation not in ended])
        model.joining = []
        self._finish(model, ended)
        ready = deque(generation for generation in model.ready if not generation.done)
        queries = deque(query for query in model.queries if not query.done)
        if dropped := len(model.ready) - len(ready) + len(model.queries) - len(queries):
            model.ready, model.queries = ready, queries
            self.count("requests_cancelled", dropped)

    def _finish(self, model: HostedModel, ended: Sequence[Generation]) -> None:
        """Count answers before their last pieces are sent: a client that has a whole answer finds it counted."""
        model.batch_size = min(self.limits.max_batch, model.batch_size + len(ended))
        for generation in ended:
            stream = generation.stream
            self.count(f"requests_{OUTCOMES[generation.finish_reason]}")
            self.count("prompt_tokens", stream.prompt_tokens)
            self.count("completion_tokens", len(generation.tokens))
            self.count("prefix_cache_hit_tokens", stream.cached_tokens)
            self.count("prefix_cache_miss_tokens", stream.prompt_tokens - stream.cached_tokens)
            self.seconds += 0.1 * (time.monotonic() - generation.begun - self.seconds)
            generation.send_last()
