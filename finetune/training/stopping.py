"""Signals that end a training: the step is finished and a checkpoint written first."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import TrainerCallback

from finetune.common.signals import SIGNALS, write_from_handler


class StopBetweenSteps(TrainerCallback):
    """While it is open, SIGINT, SIGTERM and SIGHUP end the step, write a checkpoint and stop; a Ctrl-C after one of
    them stops at once. A signal that is ignored, SIGHUP under nohup say, stays ignored.

    `signal_number`: what has asked to stop; 0: nothing. Outside the main thread, where Python handles no signals, none
    is.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: another language's
                    self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _request(self, number: int, frame: FrameType | None) -> None:
        first = not self.signal_number
        self.signal_number = self.signal_number or number
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        if first and os.getpid() == self._process and PartialState().is_main_process:  # not in a data worker
            name = "" if number == signal.SIGINT else f"{signal.Signals(number).name}: "
            write_from_handler(f"{name}finishing this step and saving a checkpoint; Ctrl-C now ends at once, unsaved")

    def agreed(self) -> int:
        """`signal_number`, the same in all processes whichever got a signal; all of them must call this together."""
        state = PartialState()
        if state.num_processes > 1:
            numbers = gather(torch.tensor(self.signal_number, device=state.device))
            self.signal_number = int(numbers.max())
        return self.signal_number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agreed():
            control.should_save = control.should_training_stop = True
