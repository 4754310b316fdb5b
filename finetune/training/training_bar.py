"""The progress bar of a stage."""

from typing import Any

from transformers import TrainerCallback

from finetune.common.console import IN_NOTEBOOK
from finetune.common.progress import bar, console, peak_memory_bytes


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
