"""What seems wrong with a stage while it trains: a loss that rises or never falls, parts that get no gradient.
Printed as a line, and kept for the report.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback

from finetune.common.progress import console
from finetune.common.run_folder import add_lines, read_lines, write_text
from finetune.model.tokenize import IGNORED
from finetune.training.collate import Batch
from finetune.training.stage_training import StageTraining
from finetune.training.steps import FEW_STEPS
from finetune.training.suspects import Suspects

FILE = "warnings.jsonl"  # in RUN/data
# Tried on the losses of 221 stages: on those that had learned none of these gave an alarm.
WINDOW = 20  # steps of a median
SPIKE_STEPS = 3  # in succession
DEVIATIONS = 8.0  # by the median absolute deviation, as that of a normal distribution
LEAST_SPIKE, LEAST_RISE = 0.25, 0.5  # nats; smaller ones aren't reported
SILENT_STEPS = 10  # with such media or rows, in succession
COUNTED = 2000  # samples whose tokens are counted


@dataclass(frozen=True)
class StageWarning:
    """`kind`: "spike", "risen", "flat", or the role of a part without gradient; `text` says all of it."""

    stage: str
    step: int
    kind: str
    text: str


class StageWatch(TrainerCallback):
    """`used`: roles that the batches of the step at hand could have a gradient for, filled by the trainer."""

    def __init__(
        self, training: StageTraining, parts: Mapping[str, Sequence[nn.Parameter]], suspects: Suspects
    ) -> None:
        self.training, self.parts, self.suspects = training, parts, suspects
        self.path = training.data / FILE
        self.used: set[str] = set()
        self.silent: Counter[str] = Counter()
        self.reported: list[StageWarning] = []
        self.losses: list[float] = []
        self.guessing: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warnings behind the step that a resumed stage goes on from are dropped; they come again where they hold."""
        known, name = read_warnings(self.path), self.training.stage.name
        left = [one for one in known if one.stage != name or one.step <= state.global_step]
        self.reported = [one for one in left if one.stage == name]
        self.losses = [entry["loss"] for entry in state.log_history if math.isfinite(entry.get("loss", math.nan))]
        if len(left) < len(known) and PartialState().is_main_process:
            write_text(self.path, "".join(_line(one) + "\n" for one in left))

    def note_batch(self, batch: Batch) -> None:
        """Before its loss is computed."""
        media = {**batch.get("features", {}), **batch.get("media", {})}
        heads = [name for name, head in batch.get("heads", {}).items() if len(head["rows"])]
        self.used |= {"adapter", *(f"heads.{name}" for name in heads)}
        self.used |= {f"{group}.{kind}" for kind in media for group in ("projectors", "encoders")}
        self.used |= {"fusion"} if media else set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for role in self.parts.keys() & self.used:
            silent = not any(p.grad is not None and bool(p.grad.any()) for p in self.parts[role])
            self.silent[role] = self.silent[role] + 1 if silent else 0
            if self.silent[role] == SILENT_STEPS:
                text = f"{role} has had no gradient in {SILENT_STEPS} steps: nothing in it learns"
                self._report(state.global_step + 1, role, text)
        self.used.clear()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Where answers are sampled, the loss is about 0 whatever is learned."""
        if not math.isfinite((logs or {}).get("loss", math.nan)) or self.training.rollouts is not None:
            return
        self.losses.append(logs["loss"])
        losses, step = self.losses, state.global_step
        middle, first = spike(losses), step - SPIKE_STEPS
        if middle is not None and not any(one.kind == "spike" and step - one.step < WINDOW for one in self.reported):
            self._report(
                step,
                "spike",
                f"the loss has risen from {middle:.3g}, the median of the {WINDOW} steps before, to "
                f"{losses[-SPIKE_STEPS]:.3g} for {SPIKE_STEPS} steps. Check the rows of step {first + 1}, "
                f"{self._rows_of(first)}; if they are right, lower learning_rate or max_grad_norm",
            )
        if step < FEW_STEPS or any(one.kind in ("risen", "flat") for one in self.reported):
            return
        begin, now = median(losses[:5]), median(losses[-WINDOW:])
        before = median(losses[-2 * WINDOW : -WINDOW])
        advice = "Is the learning rate right, are the answers, and does the stage train what it should?"
        if now > begin + max(LEAST_RISE, 0.05 * begin):
            self._report(step, "risen", f"the loss is {now:.3g}, and was {begin:.3g} when the stage began. {advice}")
        elif now > max(self._guessing(), 0.97 * before):
            self._report(
                step,
                "flat",
                f"the loss no longer falls, and is {now:.3g}: tokens guessed by how frequent they are would give "
                f"{self._guessing():.3g}. {advice}",
            )
        elif step == state.max_steps and now > max(0.97 * begin, 0.1):
            self._report(step, "flat", f"the loss has never fallen: {begin:.3g} at first, {now:.3g} at last. {advice}")

    def _rows_of(self, steps: int) -> str:
        """Of the optimizer step after so many."""
        rows = (self.suspects.row_of(steps, part) for part in range(self.training.settings.accumulate))
        return self.suspects.shown([number for row in rows for group in row for number in group])

    def _guessing(self) -> float:
        """Entropy of the learned tokens, in nats; infinity where the loss isn't their cross-entropy alone."""
        if self.guessing is None:
            collator = self.training.collator
            self.guessing = math.inf
            if self.training.stage.objective.kind == "next_token" and collator.heads is None:
                samples = collator.samples
                chosen = range(0, len(samples), max(1, len(samples) // COUNTED))
                tokens = Counter(chain.from_iterable(samples[number].labels[1:] for number in chosen))
                del tokens[IGNORED]
                self.guessing = sum(n * math.log(tokens.total() / n) for n in tokens.values()) / max(tokens.total(), 1)
        return self.guessing

    def _report(self, step: int, kind: str, text: str) -> None:
        warning = StageWarning(self.training.stage.name, step, kind, text)
        self.reported.append(warning)
        if PartialState().is_main_process:
            add_lines(self.path, [_line(warning)])
        console.print(f"{warning.stage}: step {step}: {text}")


def spike(losses: Sequence[float]) -> float | None:
    """The median of the steps before, where each of the last steps lies far above it."""
    before, last = losses[-WINDOW - SPIKE_STEPS : -SPIKE_STEPS], losses[-SPIKE_STEPS:]
    if len(before) < WINDOW:
        return None
    middle = median(before)
    deviation = 1.4826 * median(abs(loss - middle) for loss in before)
    bound = middle + max(DEVIATIONS * deviation, LEAST_SPIKE, 0.5 * middle)
    return middle if all(loss > bound for loss in last) else None


def read_warnings(path: Path) -> list[StageWarning]:
    return [StageWarning(**json.loads(line)) for line in read_lines(path)]


def warnings_of(training: StageTraining) -> list[StageWarning]:
    return [one for one in read_warnings(training.data / FILE) if one.stage == training.stage.name]


def _line(warning: StageWarning) -> str:
    return json.dumps(vars(warning), ensure_ascii=False)
