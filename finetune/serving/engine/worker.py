"""The thread that owns the models. It takes what is ready, model by model in turn: newcomers join the model's batch,
and every row of it gets one more token. Between two steps it also asks heads.
"""

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from finetune.common.errors import FinetuneError
from finetune.data.sample import Answer, Message
from finetune.model.assistant import Assistant, Look
from finetune.serving.engine import window
from finetune.serving.engine.batch import Batch
from finetune.serving.engine.cache import PrefixCache
from finetune.serving.engine.contract import Busy, TimedOut
from finetune.serving.engine.reading import Media
from finetune.serving.engine.row import Row
from finetune.serving.engine.sampling import Vocabulary

COUNTERS = (
    *("requests", "requests_finished", "requests_failed", "requests_cancelled", "requests_refused", "steps"),
    *("prompt_tokens", "completion_tokens", "prefix_cache_hit_tokens", "prefix_cache_miss_tokens"),
    *("media_cache_hits", "media_cache_misses"),
)
STOPPED = TimedOut("the server stopped before this was answered")
OUT_OF_MEMORY = re.compile("(out of|allocate) memory")  # by torch's allocators, as a RuntimeError


@dataclass
class Question:
    """What a head is asked. `look` is known once its media are decoded."""

    task: str
    messages: tuple[Message, ...]
    future: "Future[Answer]" = field(default_factory=Future)
    look: Look | None = None

    def fail(self, error: BaseException) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass
class Served:
    """A model, what waits for it, and its batch.

    weights: what each medium weighs unless a request says otherwise; the model's own change while a window runs
    together: how many rows may begin at once where none can join later; 0 where they can
    room: rows that its batch may have: fewer when memory ran out
    joining: rows that have left `ready`, and aren't in the batch yet, or never will be: those of a window
    """

    assistant: Assistant
    media: Media
    batch: Batch
    ends: frozenset[int]
    weights: dict[str, float] | None
    together: int
    room: int
    ready: deque[Row] = field(default_factory=deque)
    questions: deque[Question] = field(default_factory=deque)
    joining: list[Row] = field(default_factory=list)
    vocabulary: Vocabulary | None = None  # made when it is first needed: it takes a second

    @property
    def running(self) -> list[Row]:
        return list(dict.fromkeys([*self.batch.rows, *self.joining]))


class Worker:
    """`max_batch`, `max_batch_tokens`, `prefill_tokens`: as in `Engine`. `waiting`: requests taken, and neither in a
    batch nor answered; changed under `wake`.
    """

    def __init__(self, prefixes: PrefixCache, max_batch: int, max_batch_tokens: int, prefill_tokens: int) -> None:
        self.served: Sequence[Served] = ()
        self.prefixes = prefixes
        self.max_batch, self.max_batch_tokens, self.prefill_tokens = max_batch, max_batch_tokens, prefill_tokens
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self.seconds = 1.0  # that an answer took lately
        self.wake = threading.Condition()
        self.waiting = 0
        self.draining = self.stopped = False
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, drain_seconds: float) -> None:
        """Finish what is there within the time, then end."""
        if self._thread.ident is None:
            return
        with self.wake:
            self.draining = True
            self.wake.notify_all()
        self._thread.join(drain_seconds)
        with self.wake:
            self.stopped = True
            self.wake.notify_all()
        for served in self.served:
            for row in served.running:
                row.stream.deadline = 0.0
        self._thread.join()

    def notify(self) -> None:
        with self.wake:
            self.wake.notify_all()

    def wait_less(self, count: int = 1) -> None:
        with self.wake:
            self.waiting -= count

    def failed(self, error: Exception, *fails: Callable[[BaseException], Any]) -> None:
        """Tell those whom an error concerns."""
        self.counters["requests_failed"] += len(fails)
        told: Exception = error
        if _is_memory(error):
            told = MemoryError("not enough memory for this request here: fewer or smaller media, or shorter text")
        elif not isinstance(error, FinetuneError | TimedOut | Busy):
            logging.getLogger(__name__).error("a request failed", exc_info=error)
        for fail in fails:
            fail(told)

    def _work(self) -> None:
        while self._wait():
            for served in self.served:
                try:
                    self._turn(served)
                except Exception as error:  # whatever a model raises, the worker goes on
                    self._recover(served, error)

    def abandon(self) -> None:
        """Tell all whom the worker, which has ended, left unanswered."""
        for served in self.served:
            self.failed(STOPPED, *(row.fail for row in (*served.batch.rows, *served.ready) if not row.done))
            self.failed(STOPPED, *(question.fail for question in served.questions))

    def _wait(self) -> bool:
        """Until there is something to do; False when all is over."""
        with self.wake:
            self.wake.wait_for(lambda: self.stopped or self._busy() or (self.draining and not self.waiting))
            return not self.stopped and self._busy()

    def _busy(self) -> bool:
        return any(served.ready or served.questions or served.batch.rows for served in self.served)

    def _turn(self, served: Served) -> None:
        """One question to a head, newcomers, one step."""
        self._tidy(served)
        if served.questions:
            self._ask(served, served.questions.popleft())
        self._let_in(served)
        if served.joining and served.together:
            window.generate(served.assistant, served.joining)
        elif served.joining:
            served.batch.join(served.joining)
        self._tidy(served)
        if served.batch.rows:
            served.batch.step()
            self.counters["steps"] += 1
            self._tidy(served)

    def _let_in(self, served: Served) -> None:
        """Find who may join now, in the order in which they became ready."""
        found = served.joining
        running, limit = served.batch.rows, min(served.room, served.together or served.room)
        while served.ready and len(running) + len(found) < limit:
            row = served.ready[0]
            rows = [*running, *found, row]
            longest = max(len(other.prompt.input_ids) + other.limit for other in rows)
            if len(rows) > 1 and len(rows) * longest > self.max_batch_tokens:
                break
            if found and sum(other.length for other in (*found, row)) > self.prefill_tokens:
                break
            if found and served.together and row.weights != found[0].weights:
                break
            self.wait_less()
            found.append(served.ready.popleft())
            if not self._encoded(served, row):
                found.pop()

    def _encoded(self, served: Served, row: Row) -> bool:
        """Its media's features are there. Of a medium that can't be encoded, others never know."""
        try:
            for kind, seen in row.prompt.media.items():
                for one in seen:
                    served.media.features(kind, one)
        except Exception as error:  # whatever an encoder raises: the worker goes on
            self.failed(error, row.fail)
        return not row.done

    def _recover(self, served: Served, error: Exception) -> None:
        """A row that is alone fails; several are put back, to be read again by fewer at once, so that in the end only
        those fail whose fault it is.
        """
        running = served.running
        served.batch.clear()
        served.joining = []
        self.prefixes.kept.clear()
        rows = [row for row in running if not row.done]
        self._end(served, [row for row in running if row not in rows])
        if len(running) == 1 or not rows:
            self.failed(error, *(row.fail for row in rows))
            return
        served.room = max(1, len(rows) // 2) if _is_memory(error) else 1
        served.ready.extendleft(reversed(rows))
        self.wait_less(-len(rows))

    def _ask(self, served: Served, question: Question) -> None:
        self.wait_less()
        if not question.future.set_running_or_notify_cancel():
            self.counters["requests_cancelled"] += 1
            return
        try:
            (answer,) = served.assistant.ask(question.task, [question.messages], look=question.look)
        except Exception as error:  # as above
            self.failed(error, question.future.set_exception)
            return
        self.counters["requests_finished"] += 1
        question.future.set_result(answer)

    def _tidy(self, served: Served) -> None:
        """Let go of what has ended, and of what nobody waits for."""
        for row in (*served.running, *served.ready):
            row.look_at_clock()
        ended = [row for row in served.running if row.done]
        served.batch.keep([row for row in served.batch.rows if row not in ended])
        served.joining = []
        self._end(served, ended)
        here = [row for row in served.ready if not row.done]
        asked = [question for question in served.questions if not question.future.done()]
        if gone := len(served.ready) - len(here) + len(served.questions) - len(asked):
            self.wait_less(gone)
            self.counters["requests_cancelled"] += gone
            served.ready, served.questions = deque(here), deque(asked)

    def _end(self, served: Served, ended: Sequence[Row]) -> None:
        """Count them, then tell their ends: whoever has all of an answer finds it counted."""
        served.room = min(self.max_batch, served.room + len(ended))
        for row in ended:
            self._count(row)
            row.tell_end()

    def _count(self, row: Row) -> None:
        ends = {"stop": "finished", "length": "finished", "error": "failed", None: "cancelled"}
        self.counters[f"requests_{ends[row.finish_reason]}"] += 1
        self.counters["prompt_tokens"] += row.stream.prompt_tokens
        self.counters["completion_tokens"] += len(row.tokens)
        self.counters["prefix_cache_hit_tokens"] += row.stream.cached_tokens
        self.counters["prefix_cache_miss_tokens"] += row.stream.prompt_tokens - row.stream.cached_tokens
        took = time.monotonic() - row.begun
        self.seconds += 0.1 * (took - self.seconds)


def _is_memory(error: Exception) -> bool:
    by_torch = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
    return isinstance(error, MemoryError) or bool(by_torch)
