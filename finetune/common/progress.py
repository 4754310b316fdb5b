"""What is seen while it works: progress bars and plain lines, by rich."""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from finetune.common.console import IN_NOTEBOOK, plain_console

# Of several processes one speaks.
console = plain_console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")


def peak_memory_bytes() -> dict[str, int]:
    """The most this process has held: resident memory, and the accelerator's where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peaks["cuda"] = torch.cuda.max_memory_allocated()
    return peaks


def fresh_memory() -> None:
    """Let go of what an earlier stage has left, and count the accelerator's peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def trim_memory() -> None:
    """Give the system back what glibc keeps between blocks that are in use: it would grow with modules or rows."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


class Stopwatch:
    """`seconds`, and CPU seconds of this process and of its workers that have ended, {what they went to: how many}."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add what the block takes."""
        begin, cpu = perf_counter(), sum(os.times()[:4])
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - begin
            self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + sum(os.times()[:4]) - cpu


@contextmanager
def bar(what: str, total: int, completed: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar; call what it gives once a step, with text to show beside it. `completed`: steps done before."""
    columns = (
        TextColumn("{task.description:<18}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(compact=True),
    )
    # In notebooks rich's own display needs ipywidgets, and warns where they are missing.
    with Progress(*columns, console=console, disable=IN_NOTEBOOK) as progress:
        task = progress.add_task(what, total=total, completed=completed, note="")
        live = LiveDisplay() if IN_NOTEBOOK else None

        def step(note: str = "", completed: int | None = None) -> None:
            if completed is None:
                progress.update(task, advance=1, note=note)
            else:
                progress.update(task, completed=completed, note=note)
            if live is not None and (live.stale or progress.finished):
                live.show(progress)

        yield step


class LiveDisplay:
    """A place below a notebook's cell whose content is shown anew; only where IN_NOTEBOOK."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown_at = 0.0

    @property
    def stale(self) -> bool:
        """Whether what is seen is older than a quarter of a second."""
        return perf_counter() - self._shown_at > 0.25

    def show(self, content: Any, width: int | None = None) -> None:
        """`content`: an object that IPython can display, or MIME type -> data; `width`: of a PNG, in CSS pixels."""
        from IPython.display import display

        options: dict[str, Any] = {"raw": isinstance(content, dict)}
        if width is not None:
            options["metadata"] = {"image/png": {"width": width}}
        if self._handle is None:
            self._handle = display(content, display_id=True, **options)
        else:
            self._handle.update(content, **options)
        self._shown_at = perf_counter()


def quiet_libraries() -> None:
    """Silence warnings that are about how this package calls libraries: a user can do nothing about them. Only what
    these libraries' own modules warn of; warnings of the user's code stay.
    """
    import logging
    import warnings

    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # weights on disk are there on purpose
    libraries = r"(accelerate|bitsandbytes|datasets|huggingface_hub|peft|torch|transformers|trl)(\.|$)"
    for category in (FutureWarning, UserWarning):  # of names and defaults that are going to change
        warnings.filterwarnings("ignore", category=category, module=libraries)
