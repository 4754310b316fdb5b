"""Packed rows computed in pieces where memory runs out: the micro-batch is halved and accumulation doubled, so that the
batch of the step, its loss and its gradients stay the same.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from finetune.common.errors import RESUME, OutOfMemory, option
from finetune.common.memory import TRAINING, attempt
from finetune.common.progress import console
from finetune.common.run_folder import add_lines, read_lines
from finetune.training.pack import Row
from finetune.training.stage_training import StageTraining
from finetune.training.suspects import Suspects

FILE = "micro_batches.jsonl"  # in RUN/data


@dataclass(frozen=True)
class Halved:
    """From packed row `row` (from 0) of optimizer step `step` (from 1) on, rows are computed in so many `pieces`."""

    stage: str
    step: int
    row: int
    pieces: int


class MicroBatches:
    """In how many pieces the packed rows of a stage are computed; kept in a file, so that a resumed run halves at the
    same place. `trainer`: a `StageTrainer`.
    """

    def __init__(self, trainer: Any, suspects: Suspects, training: StageTraining) -> None:
        self.trainer, self.suspects, self.training = trainer, suspects, training
        self.halved = halved_of(training)
        self.piece: Row = []  # that is being computed
        self.random: list[Tensor] = []  # states of the generators when the step began

    @property
    def pieces(self) -> int:
        steps, row = self.trainer.row
        return max((one.pieces for one in self.halved if (one.step, one.row) <= (steps + 1, row)), default=1)

    def step(self, compute: Callable[[int], Tensor]) -> Tensor:
        """`compute(n)`: the loss of the nth packed row of this optimizer step, with its gradients. The loss of the row
        at hand; where memory runs out, the gradients of the whole step so far are computed anew, in more pieces.
        Raises OutOfMemory.
        """
        trainer = self.trainer
        steps, row = trainer.row
        logged, first = trainer.logged(), row
        if row == 0:
            self.random = random_states()

        def attempted() -> Tensor:
            for number in range(first, row):
                trainer.row = steps, number
                compute(number)
                trainer.restore_log(logged)
            trainer.row = steps, row
            return compute(row)

        while (loss := attempt(attempted)) is None:
            trainer.model.zero_grad()
            trainer.restore_log(logged)
            self._halve()
            set_random_states(self.random)
            first = 0
        return loss

    def loss(self, model: Any, inputs: Any, row: Row, items: Any) -> Tensor:
        """The loss of a packed row, whose batch is `inputs`, with its gradients."""
        pieces = split(self.suspects.units(row), self._tokens_of, self.pieces) if self.pieces > 1 else []
        if len(pieces) < 2:
            self.piece = row
            loss: Tensor = self.trainer.loss_and_gradients(model, inputs, items)
            return loss
        items = self.trainer.items_of([inputs]) if items is None else items
        losses = []
        for units in pieces:
            chosen = [number for unit in units for number in unit]
            self.piece = [own for group in row if (own := [number for number in group if number in chosen])]
            losses.append(self.trainer.loss_and_gradients(model, self.trainer.prepared(self.piece), items))
        return torch.stack(losses).sum()

    def _tokens_of(self, unit: Sequence[int]) -> int:
        return sum(self.suspects.collator.samples.lengths[number] for number in unit)

    def _halve(self) -> None:
        """For the row at which memory ran out, and all later ones. Raises OutOfMemory where that can't be."""
        trainer, stage = self.trainer, self.training.stage
        steps, row = trainer.row
        where = f"{stage.name}: out of memory at step {steps + 1}"
        if why := self._why_whole():
            raise OutOfMemory(
                f"{where}; {why}. To need less, {TRAINING}. {option(*RESUME)} goes on from the step before, also with "
                "the first two of these changed"
            )
        pieces = 2 * self.pieces
        self.halved.append(Halved(stage.name, steps + 1, row, pieces))
        add_lines(self.training.data / FILE, [json.dumps(vars(self.halved[-1]))])
        settings = self.training.settings
        tokens = max(int(settings.tokens_per_batch) // pieces, 16)
        console.print(
            f"{where}: from here on each packed row is computed in {pieces} pieces, one after the other: the same "
            f"batch, the same loss, more time. For the next run write train.tokens_per_batch: {tokens} and "
            f"train.accumulate: {settings.accumulate * pieces}"
        )

    def _why_whole(self) -> str:
        """Why the piece can't be halved; '' where it can."""
        if self.trainer.accelerator.num_processes > 1:
            return "with several processes rows aren't computed in pieces"
        objective = self.training.stage.objective
        if not objective.separable:
            return f"the loss of {objective.kind} is one of whole packed rows, which can't be halved"
        if self.trainer.aux_loss_enabled:
            llm = type(self.trainer.accelerator.unwrap_model(self.trainer.model).causal_lm).__name__
            return f"the auxiliary loss of the routers of {llm} is one of whole packed rows, which can't be halved"
        units = self.suspects.units(self.piece)
        if len(units) == 1:
            return f"{self.suspects.names(units[0])[0]} takes more than there is, alone"
        return ""


def halved_of(training: StageTraining) -> list[Halved]:
    found = [Halved(**json.loads(line)) for line in read_lines(training.data / FILE)]
    return [one for one in found if one.stage == training.stage.name]


def random_states() -> list[Tensor]:
    """What dropout draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_random_states(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


def split(units: Sequence[list[int]], tokens_of: Callable[[list[int]], int], pieces: int) -> list[list[list[int]]]:
    """Units in their order, in as many pieces of about as many tokens, or fewer: none is split, none is empty."""
    tokens = [tokens_of(unit) for unit in units]
    total, before, found = sum(tokens), 0, []
    for unit, own in zip(units, tokens, strict=True):
        found.append((pieces * (2 * before + own) // (2 * total), unit))  # by where its middle lies
        before += own
    return [[unit for _, unit in piece] for _, piece in groupby(found, lambda one: one[0])]
