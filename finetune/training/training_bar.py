"""What is seen of a stage while it trains: a progress bar, and in notebooks the loss so far as a picture below it."""

import base64
from time import perf_counter
from typing import Any

from transformers import TrainerCallback

from finetune.common.console import IN_NOTEBOOK
from finetune.common.progress import LiveDisplay, bar, console, peak_memory_bytes
from finetune.evaluation import plots

WIDTH, HEIGHT = 7.0, 3.0  # inches
CSS_INCH = 96  # pixels
SHARE = 0.02  # of the time goes into drawing, at most


class TrainingBar(TrainerCallback):
    """Step, loss, tokens a second, memory, time left; a plain line now and then where nothing can be shown live."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage = stage
        self.total = total
        self._context: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._context = bar(self.stage, self.total, completed=state.global_step)
        self._step = self._context.__enter__()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        speed = logs.get("tokens_per_second", 0.0)  # none after the first step
        memory = max(peak_memory_bytes().values()) / 2**30
        note = f"loss {logs['loss']:.3f}  {speed:,.0f} tokens/s  {memory:.1f} GiB"
        self._step(note, completed=state.global_step)
        if not (console.is_terminal or IN_NOTEBOOK) and state.global_step % max(1, self.total // 5) == 0:
            console.print(f"  {self.stage}: step {state.global_step}/{self.total}  {note}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Also called where training ends by an error. Does nothing the second time."""
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None


class LiveCurve(TrainerCallback):
    """Draws while a stage trains in a notebook of this process; does nothing elsewhere."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._display = LiveDisplay() if IN_NOTEBOOK else None
        self._next = 0.0

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if perf_counter() >= self._next:
            self._draw(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw(state)

    def _draw(self, state: Any) -> None:
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if self._display is None or len(losses) < 2:
            return
        begin = perf_counter()
        picture = plots.png(plots.losses_figure({self.stage: losses}, width=WIDTH, height=HEIGHT))
        data = {"image/png": base64.b64encode(picture).decode(), "text/plain": f"loss {losses[-1]:.3f}"}
        self._display.show(data, width=round(WIDTH * CSS_INCH))
        self._next = perf_counter() + max(1.0, (perf_counter() - begin) / SHARE)
