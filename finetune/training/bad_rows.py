"""Values that aren't finite: the training stops in the same step with the rows named, or leaves such rows out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

from finetune.common.errors import RESUME, TrainingError, option
from finetune.common.progress import console
from finetune.training.pack import Row
from finetune.training.suspects import Suspects, without

SKIPPED = 20  # steps in a row; the scaler's first scale of 2^16 is halved each time, so that a few are usual


class NotFinite(TrainingError):
    """The weights are those of the last whole step."""


class BadRows:
    """`trainer`: a `StageTrainer`; `skip`: whether bad rows are left out."""

    def __init__(self, trainer: Any, suspects: Suspects, skip: bool) -> None:
        self.trainer, self.suspects, self.skip = trainer, suspects, skip
        self.removed: Any = 0  # items of the step that were left out
        self.lost = 0  # packed rows in succession of which nothing was learned

    def loss(self, model: Any, inputs: Any, row: Row, items: Any) -> Tensor:
        """The loss of a packed row, whose batch is `inputs`, with its gradients. Raises NotFinite."""
        if self.skip:
            return self._without_bad_rows(model, inputs, row, items)
        loss: Tensor = self.trainer.micro_batches.loss(model, inputs, row, items)
        if not torch.isfinite(loss):
            raise self.not_finite(f"the loss is {loss.item()} at step {self.trainer.row[0] + 1}", whole_step=False)
        return loss

    def _without_bad_rows(self, model: Any, inputs: Any, row: Row, items: Any) -> Tensor:
        """Samples that make the loss or a gradient infinite are noted and left out, also of the items that the loss of
        the step is a mean over.
        """
        trainer = self.trainer
        steps, part = trainer.row
        self.removed = self.removed if part else 0
        logged = trainer.logged()
        items = None if items is None else items - self.removed
        gradients = {p: p.grad.clone() for p in trainer.trained if p.grad is not None}
        loss: Tensor = trainer.micro_batches.loss(model, inputs, row, items)
        if self._finite(loss):
            self.lost = 0
            return loss
        bad, alone = self._bad_samples(model, row)
        rest = without(row, bad)
        if rest:
            batch: Any = trainer.prepared(rest)
            fewer = self._items_without(inputs, batch, items)
            self._restore(_for_other_items(gradients, items, fewer), logged)
            loss = trainer.micro_batches.loss(model, batch, rest, fewer)
        if rest and self._finite(loss):
            self.lost = 0
        else:
            bad, alone, self.lost = [number for group in row for number in group], False, self.lost + 1
            fewer = self._items_without(inputs, None, items)
            self._restore(_for_other_items(gradients, items, fewer), logged)
            loss = torch.zeros_like(loss)
        self.removed += 0 if items is None else items - fewer
        names = self.suspects.note(bad, steps + 1, "loss or gradient not finite", alone=alone, left_out=True)
        console.print(f"{trainer.stage.name}: step {steps + 1}: left out, their loss isn't finite: {names}")
        if self.lost >= SKIPPED:
            raise NotFinite(
                f"from none of the last {SKIPPED} packed rows up to step {steps + 1} a finite loss was had: the rows "
                f"aren't the cause. {self.advice()}"
            )
        return loss

    def _items_without(self, inputs: Any, rest: Any, items: Any) -> Any:
        """The items of a step in which `rest` comes in the place of a batch; None where they aren't counted."""
        if items is None:
            return None
        there, left = (self.trainer.items_of([one]) if one else 0 for one in (inputs, rest))
        return items - there + left

    def _bad_samples(self, model: Any, row: Row) -> tuple[list[int], bool]:
        """The samples of a packed row whose loss or gradients aren't finite when each is alone, or only beside those
        that it is compared with, and True; all of them, and False, where each alone is fine, or can't be tried: with
        several processes, or as sampled answers are gone. Gradients are lost.
        """
        trainer = self.trainer
        units = self.suspects.units(row)
        numbers = [number for unit in units for number in unit]
        found: list[int] = []
        logged = trainer.logged()
        for unit in units if trainer.accelerator.num_processes == 1 and trainer.rollouts is None else ():
            trainer.restore_gradients({})
            if not self._finite(trainer.loss_and_gradients(model, trainer.prepared([[one] for one in unit]))):
                found += unit
        self._restore({}, logged)
        return found or numbers, bool(found)

    def _restore(self, gradients: Mapping[nn.Parameter, Tensor], logged: Mapping[str, Any]) -> None:
        self.trainer.restore_gradients(gradients)
        self.trainer.restore_log(logged)

    def _finite(self, loss: Tensor) -> bool:
        """Under fp16 the scaler checks gradients."""
        if not torch.isfinite(loss):
            return False
        return bool(self.trainer.args.fp16) or finite_gradients(self.trainer.trained)

    def not_finite(self, what: str, whole_step: bool = True) -> NotFinite:
        """What to raise: names the rows of the packed row at hand, or of the whole step, that give such values."""
        steps, part = self.trainer.row
        parts = range(part + 1) if whole_step else (part,)
        row = [group for each in parts for group in self.suspects.row_of(steps, each)]
        bad, alone = self._bad_samples(self.trainer.model_wrapped, row)
        names = self.suspects.note(bad, steps + 1, what, alone=alone, left_out=False)
        together = "" if alone else "no row by itself; together "
        return NotFinite(
            f"{what}, from {together}{names} (all: {self.suspects.path}); the weights are those of "
            f"the step before. {self.advice()}"
        )

    def advice(self) -> str:
        assignment = option("--set", "overrides=")
        return (
            f"{option(*RESUME)} goes on from there: with {assignment} train.skip_bad_rows=true without such rows, or "
            f"with a lower learning_rate or max_grad_norm of the stage {self.trainer.stage.name}"
        )


class FiniteGradients(TrainerCallback):
    """Stops before an optimizer step whose gradients aren't finite. Under fp16 the scaler skips single such steps, and
    only many in a row stop the run.
    """

    def __init__(self, parts: dict[str, list[nn.Parameter]], error: Callable[[str], TrainingError]) -> None:
        """`error`: what to raise, by what was seen."""
        self.parameters = [parameter for own in parts.values() for parameter in own]
        self.error = error
        self.skipped = 0

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.skipped = self.skipped + 1 if getattr(optimizer, "step_was_skipped", False) else 0
        if self.skipped >= SKIPPED:
            raise TrainingError(
                f"the last {SKIPPED} steps up to {state.global_step} were skipped: their gradients weren't finite in "
                "float16. Lower the learning rate, or train on a device with bfloat16"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.fp16 and not finite_gradients(
            self.parameters
        ):  # of which part is unknown: they were clipped together
            raise self.error(f"a gradient isn't finite at step {state.global_step + 1}")


def _for_other_items(gradients: Mapping[nn.Parameter, Tensor], items: Any, others: Any) -> dict[nn.Parameter, Tensor]:
    """Gradients of a mean over `items` as those of a mean over `others`."""
    factor = float(items / others) if items is not None and others else 1.0
    return {parameter: gradient * factor for parameter, gradient in gradients.items()}


def finite_gradients(parameters: Sequence[nn.Parameter]) -> bool:
    """A norm of all of them above 1.8e19, whose square is beyond float32, counts as infinite."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return bool(torch.isfinite(get_total_norm(gradients)))
