"""Progress bars and plain lines on the terminal, by rich; peak memory."""

import gc
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

# Only the first of several processes prints.
console = Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")


def peak_memory_bytes() -> dict[str, int]:
    """Peak memory of this process in bytes: resident ("cpu"), and on the GPU ("cuda") if there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peaks["cuda"] = torch.cuda.max_memory_allocated()
    return peaks


def fresh_memory() -> None:
    """Free memory that is no longer used, and reset the GPU's peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar; call the function it yields once per step, with text to show beside the bar."""
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total, note="")

        def step(note: str = "", completed: int | None = None) -> None:
            if completed is None:
                progress.update(task, advance=1, note=note)
            else:
                progress.update(task, completed=completed, note=note)

        yield step


class TrainingBar(TrainerCallback):
    """Step, loss, tokens per second, memory, time left; without a terminal, five plain lines per stage."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage = stage
        self.total = total
        self.begin = perf_counter()
        self.first: tuple[int, float] | None = None
        self._context: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._context = bar(self.stage, self.total)
        self._step = self._context.__enter__()
        self.begin = perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        tokens, now = int(logs.get("num_tokens", 0)), perf_counter()
        if self.first is None:  # the first step warms up: it isn't counted
            self.first = (tokens, now)
        speed = (tokens - self.first[0]) / (now - self.first[1]) if now > self.first[1] else 0.0
        memory = max(peak_memory_bytes().values()) / 2**30
        note = f"loss {logs['loss']:.3f}  {speed:,.0f} tokens/s  {memory:.1f} GiB"
        self._step(note, completed=state.global_step)
        if not console.is_terminal and state.global_step % max(1, self.total // 5) == 0:
            console.print(f"  {self.stage}: step {state.global_step}/{self.total}  {note}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Also called when training ends with an error; a second call does nothing."""
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None


def quiet_libraries() -> None:
    """Hide warnings of libraries: they are for developers, not for users of a recipe."""
    import logging
    import warnings

    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # weights on disk are there on purpose
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch|peft|trl|transformers|bitsandbytes")
