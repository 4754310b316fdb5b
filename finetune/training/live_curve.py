"""The loss so far as a picture below the progress bar, in notebooks."""

import base64
from time import perf_counter
from typing import Any

from transformers import TrainerCallback

from finetune.common.console import IN_NOTEBOOK
from finetune.common.progress import LiveDisplay
from finetune.evaluation import plots

WIDTH, HEIGHT = 7.0, 3.0  # inches
CSS_INCH = 96  # pixels
SHARE = 0.02  # of the time goes into drawing, at most


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
