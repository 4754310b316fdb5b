"""Chat templates within a time limit: they come with a model, may be anybody's, and can loop."""

import ctypes
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

SECONDS = 5.0


class TemplateTimeout(Exception):
    def __init__(self) -> None:
        super().__init__(f"it wasn't rendered within {SECONDS:g} s")


class _Watch:
    """Raises TemplateTimeout in threads that are still in their block when its time is over."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.ends: dict[int, float] = {}  # thread -> when, as time.monotonic()
        self.thread: threading.Thread | None = None
        self.until = 0.0  # what the thread waits for; it is woken for what ends sooner, not for each block

    def enter(self) -> None:
        with self.changed:
            end = self.ends[threading.get_ident()] = time.monotonic() + SECONDS
            if self.thread is None:
                self.thread = threading.Thread(target=self._watch, name="templates", daemon=True)
                self.thread.start()
            elif end < self.until:
                self.changed.notify()

    def leave(self) -> bool:
        """Whether the time was over: then the exception may still be on its way."""
        with self.changed:
            return self.ends.pop(threading.get_ident(), None) is None

    def _watch(self) -> None:
        with self.changed:
            while True:
                self.until = min(self.ends.values(), default=math.inf)
                self.changed.wait(self.until - time.monotonic() if self.ends else None)
                for thread in [thread for thread, end in self.ends.items() if end <= time.monotonic()]:
                    del self.ends[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(TemplateTimeout)
                    )


_watch = _Watch()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_watch.__init__)  # type: ignore[misc]


@contextmanager
def limited() -> Iterator[None]:
    """Raises TemplateTimeout where what the block renders takes longer than SECONDS."""
    _watch.enter()
    late = False
    try:
        try:
            yield
        finally:
            late = _watch.leave()
    finally:
        if late:
            time.sleep(0)
            for _ in range(1000):  # where the exception arrives, if it hasn't yet
                pass


def rendered(tokenizer: Any, turns: Sequence[Any], add_generation_prompt: bool = False, **options: Any) -> str:
    """A conversation by the chat template. Raises TemplateTimeout, or what the template's author chose: jinja2's
    TemplateError or any other exception.
    """
    with limited():
        return str(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt, **options)
        )
