"""trl's SFTTrainer, subclassed once: only what was trained is saved, checkpoints are whole or absent, and nothing that
isn't finite reaches the weights.
"""

import math
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from finetune.common.disk import writing
from finetune.common.errors import RESUME, RUN, Interrupted, TrainingError, option
from finetune.common.progress import console
from finetune.common.run_folder import read_json
from finetune.model.adapter import load_trained, save_trained
from finetune.model.composite import MultimodalModel
from finetune.model.row_plan import by_segments
from finetune.model.trainable import trained_parts
from finetune.recipe.schema import Stage, Train
from finetune.training.checkpoints import KEPT, STAGING, WholeCheckpoints, seconds_of, step_of
from finetune.training.collate import Batch, Collator
from finetune.training.objectives import BatchLoss
from finetune.training.pack import Row, Rows
from finetune.training.reference import Reference
from finetune.training.rollouts import Rollouts, SaveRollouts
from finetune.training.stopping import StopBetweenSteps
from finetune.training.suspects import FILE, Suspects, without
from finetune.training.tracked_answers import show_answers
from finetune.training.tracking import end_tracking, reported_to, tensorboard_callbacks

FUSED = ("log_probs", "entropy", "is_top1")  # the outputs of its head that trl's SFTTrainer uses
SKIPPED = 20  # steps in a row; the scaler's first scale of 2^16 is halved each time, so that a few are usual


LOGGED = ("_metrics", "_total_train_tokens", "accuracies", "figures", "tokens")  # by trl and here, from batch to batch


class NotFinite(TrainingError):
    """The weights are those of the last whole step."""


@dataclass(frozen=True)
class StageTraining:
    """What one stage trains with. `rows`: of the collator's samples, in the order in which they train, over all epochs;
    `folder`: for checkpoints, RUN/checkpoints/STAGE; `origin`: see `Reference`; `rollouts`: where the stage
    learns from answers sampled from the model.
    """

    model: MultimodalModel
    tokenizer: Any
    stage: Stage
    settings: Train
    collator: Collator
    rows: Sequence[Row]
    folder: Path
    seed: int
    dtype: torch.dtype
    origin: str = ""
    rollouts: Rollouts | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        result: int = -(-len(self.rows) // (self.settings.accumulate * PartialState().num_processes))
        return result


def train_stage(
    training: StageTraining,
    stop: StopBetweenSteps,
    resume_from: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Train what has requires_grad; the log, an entry a step.

    Raises Interrupted where `stop` was asked to end it before its last step, with a whole checkpoint on disk, and
    TrainingError on a value that isn't finite.
    """
    stage, parts = training.stage, trained_parts(training.model, training.stage.trains)
    track, run = training.settings.track, training.folder.parents[1]
    first_step = 1 + (step_of(resume_from) if resume_from else 0)
    # `stop` comes last: what is asked while another callback validates holds for this step.
    boards = tensorboard_callbacks(track, run / "tensorboard" / stage.name, first_step)
    gradients = FiniteGradients(parts)
    rollouts = training.rollouts
    kept = [SaveRollouts(rollouts, training.folder)] if rollouts else []
    callbacks = [
        *boards,
        gradients,
        *kept,
        WholeCheckpoints(training.folder, seconds_of(resume_from)),
        *callbacks,
        stop,
    ]
    trainer = StageTrainer(
        training,
        parts,
        model=training.model,
        args=trainer_arguments(training),
        train_dataset=packed_rows(training.rows),
        data_collator=list if rollouts else training.collator,
        processing_class=training.tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    gradients.error = trainer.not_finite
    for callback in callbacks:
        if hasattr(callback, "report"):
            callback.report = trainer.report
        if hasattr(callback, "show"):
            callback.show = partial(show_answers, track, boards)
    try:
        with as_training_errors(trainer, resume_from):
            if rollouts:
                rollouts.begin([parameter for own in parts.values() for parameter in own], resume_from)
            if stage.objective.reference:
                path = run / "data" / f"reference-{stage.name}.safetensors"
                reference = Reference(path, training.origin, training.model, training.collator)
                training.collator.reference = reference.log_probs(
                    training.rows, trainer.accelerator.autocast(), resumed=resume_from is not None
                )
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        for callback in callbacks:
            getattr(callback, "close", lambda: None)()
        end_tracking(track)
        for patched in ("forward", "_original_forward"):  # trl's fused head and accelerate's autocast
            training.model.__dict__.pop(patched, None)
    ended = any(getattr(callback, "ended", False) for callback in callbacks)
    if stop.signal_number and not ended and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}", stop.signal_number
        )
    return [entry for entry in trainer.state.log_history if "loss" in entry and math.isfinite(entry["loss"])]


@contextmanager
def as_training_errors(trainer: "StageTrainer", resume_from: Path | None) -> Iterator[None]:
    """What a training ends with that can't go on, as TrainingErrors."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "out of GPU memory. In this order: train.checkpoint_every_n_layers: 1, a smaller train.tokens_per_batch "
            "(with more train.accumulate), optimizer: paged_adamw_8bit, model.llm.quantize: nf4. "
            f"{option(*RESUME)} needs the same recipe: begin anew with {option(*RUN)}"
        ) from error
    except NotFinite:
        trainer.save_at_once()
        raise
    except UnpicklingError:  # transformers loads them with weights_only
        raise TrainingError(
            f"{resume_from}: optimizer.pt, scheduler.pt or rng_state.pth holds something else than tensors and "
            "numbers, and isn't loaded: it wasn't written by a training. Remove this folder; "
            f"{option(*RESUME)} goes on from the checkpoint before"
        ) from None


def suspects_of(training: StageTraining) -> Suspects:
    path = training.folder.parents[1] / "data" / FILE
    return Suspects(path, training.stage.name, training.rows, training.collator, training.settings.accumulate)


def packed_rows(rows: Sequence[Row]) -> Dataset:
    """Rows for all processes: the last ones are filled up with rows from which nothing is learned."""
    packed = rows if isinstance(rows, Rows) else Rows.of(rows)
    filler = -len(packed) % PartialState().num_processes
    by_group = pa.LargeListArray.from_arrays(_arrow(packed.groups), _arrow(packed.samples))
    by_row = pa.LargeListArray.from_arrays(_arrow(packed.ends), by_group)
    numbers = np.arange(len(packed) + filler)
    groups = by_row.take(pa.array(numbers % len(packed))) if filler else by_row
    return Dataset.from_dict({"groups": groups, "filler": pa.array(numbers >= len(packed))})


def _arrow(numbers: "array[int]") -> pa.Array:
    """The same memory as an Arrow array."""
    return pa.array(np.frombuffer(numbers, f"i{numbers.itemsize}"))


def trainer_arguments(training: StageTraining) -> SFTConfig:
    stage, settings = training.stage, training.settings
    on_gpu = next(training.model.parameters()).is_cuda
    return SFTConfig(
        output_dir=str(training.folder / STAGING),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.accumulate,
        num_train_epochs=1,  # `rows` holds all epochs
        train_sampling_strategy="sequential",
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.scheduler,
        # The first of the warmup's steps has a rate of zero: too much where the whole stage is a few steps.
        warmup_steps=stage.warmup if stage.warmup * training.steps >= 1 else 0.0,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        optim=stage.optimizer,
        bf16=on_gpu and training.dtype == torch.bfloat16,
        fp16=on_gpu and training.dtype == torch.float16,
        use_cpu=not on_gpu,
        gradient_checkpointing=False,  # switched on in the LLM, where it belongs
        save_strategy="steps",
        save_steps=settings.save_every_n_steps,
        save_total_limit=KEPT,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=training.seed,
        data_seed=training.seed,
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        label_names=["labels"],
        ddp_find_unused_parameters=False,  # all that trains is used in every step, if only multiplied by zero
        report_to=reported_to(settings.track),
        run_name=f"{training.folder.parents[1].name}-{stage.name}",
        project="finetune",
        disable_tqdm=True,
    )


class StageTrainer(SFTTrainer):
    """A step: `training_step` checks the loss that `compute_loss` gives; the callbacks check gradients and save."""

    model: Any
    args: Any
    accelerator: Any

    def __init__(self, training: StageTraining, parts: dict[str, list[nn.Parameter]], **kwargs: Any) -> None:
        """`parts`: {role: parameters that train}; `kwargs`: trl's own."""
        self.stage, self.rollouts = training.stage, training.rollouts
        self.suspects, self.skip_bad_rows = suspects_of(training), training.settings.skip_bad_rows
        if self.skip_bad_rows and PartialState().num_processes > 1:  # their gradients are summed before they are tried
            raise TrainingError("train.skip_bad_rows: only for one process; leave it out, or launch one")
        self.row: tuple[int, int] = 0, -1  # steps made, and which of the packed rows of the next one this is
        self.removed: Any = 0  # items of the step that were left out
        self.lost = 0  # packed rows in succession of which nothing was learned
        self.parts = parts
        self.accuracies: list[float] = []
        self.figures: dict[str, list[tuple[float, int]]] = {}  # of the batches since the last log, with their items
        self.tokens = 0  # of all processes so far, where the loss isn't trl's own
        self.first_log: tuple[int, float] | None = None  # tokens and seconds
        super().__init__(**kwargs)
        if self.rollouts and self.rollouts.options.temperature != 1:  # that at which answers are sampled
            add_fused_lm_head(self.model, self.rollouts.options.temperature, outputs=FUSED)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of an optimizer step; where the objective samples answers, with those sampled now."""
        if self.rollouts is not None:
            rows = [row for batch in islice(epoch_iterator, num_batches) for row in batch]
            model = self.accelerator.unwrap_model(self.model)
            epoch_iterator = iter(
                self.rollouts.batches(rows, self.state.global_step, model, self.accelerator.autocast())
            )
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        steps, part = self.row
        self.row = (steps, part + 1) if steps == self.state.global_step else (self.state.global_step, 0)
        self.removed = self.removed if self.row[1] else 0
        if self.skip_bad_rows:
            return self._without_bad_rows(model, inputs, num_items_in_batch)
        loss = self._loss_and_gradients(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self.not_finite(f"the loss is {loss.item()} at step {self.row[0] + 1}", whole_step=False)
        return loss

    def _loss_and_gradients(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        planned = "row_plan" in inputs
        with by_segments(self.accelerator.unwrap_model(model).causal_lm) if planned else nullcontext():
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def _without_bad_rows(self, model: Any, inputs: Any, items: Any) -> Tensor:
        """A packed row's loss and gradients; those of its samples that make them infinite are noted and left out, also
        of the items that the loss of the step is a mean over.
        """
        logged = self._logged()
        items = None if items is None else items - self.removed
        gradients = {p: p.grad.clone() for p in self._trained() if p.grad is not None}
        loss = self._loss_and_gradients(model, inputs, items)
        if self._finite(loss):
            self.lost = 0
            return loss
        steps, row = self.row[0], self.suspects.row_of(*self.row)
        bad, alone = self._bad_samples(model, row)
        rest = without(row, bad)
        if rest:
            batch: Any = self._prepare_inputs(self.suspects.batch(rest))
            fewer = self._items_without(inputs, batch, items)
            self._restore(_for_other_items(gradients, items, fewer), logged)
            loss = self._loss_and_gradients(model, batch, fewer)
        if rest and self._finite(loss):
            self.lost = 0
        else:
            bad, alone, self.lost = [number for group in row for number in group], False, self.lost + 1
            fewer = self._items_without(inputs, None, items)
            self._restore(_for_other_items(gradients, items, fewer), logged)
            loss = torch.zeros_like(loss)
        self.removed += 0 if items is None else items - fewer
        names = self.suspects.note(bad, steps + 1, "loss or gradient not finite", alone=alone, left_out=True)
        console.print(f"{self.stage.name}: step {steps + 1}: left out, their loss isn't finite: {names}")
        if self.lost >= SKIPPED:
            raise NotFinite(
                f"from none of the last {SKIPPED} packed rows up to step {steps + 1} a finite loss was had: the rows "
                f"aren't the cause. {self._advice()}"
            )
        return loss

    def _items_without(self, inputs: Any, rest: Any, items: Any) -> Any:
        """The items of a step in which `rest` comes in the place of a batch; None where they aren't counted."""
        if items is None:
            return None
        there, left = (self._get_num_items_in_batch([one], self.args.device) if one else 0 for one in (inputs, rest))
        return items - there + left

    def _bad_samples(self, model: Any, row: Row) -> tuple[list[int], bool]:
        """The samples of a packed row whose loss or gradients aren't finite when each is alone, or only beside those
        that it is compared with, and True; all of them, and False, where each alone is fine, or can't be tried: with
        several processes, or as sampled answers are gone. Gradients are lost.
        """
        units = self.suspects.units(row)
        numbers = [number for unit in units for number in unit]
        found: list[int] = []
        logged = self._logged()
        for unit in units if self.accelerator.num_processes == 1 and self.rollouts is None else ():
            self._restore({}, None)
            loss = self._loss_and_gradients(model, self._prepare_inputs(self.suspects.batch([[one] for one in unit])))
            if not self._finite(loss):
                found += unit
        self._restore({}, logged)
        return found or numbers, bool(found)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameters in self.parts.values() for parameter in parameters]

    def _finite(self, loss: Tensor) -> bool:
        """Under fp16 the scaler checks gradients."""
        if not torch.isfinite(loss):
            return False
        return self.args.fp16 or finite_gradients(self._trained())

    def _logged(self) -> dict[str, Any]:
        """What a batch adds to the log."""
        return {name: deepcopy(getattr(self, name)) for name in LOGGED}

    def _restore(self, gradients: Mapping[nn.Parameter, Tensor], logged: Mapping[str, Any] | None) -> None:
        for parameter in self._trained():
            parameter.grad = gradients[parameter].clone() if parameter in gradients else None
        for name, value in (logged or {}).items():
            setattr(self, name, deepcopy(value))

    def not_finite(self, what: str, whole_step: bool = True) -> "NotFinite":
        """What to raise: names the rows of the packed row at hand, or of the whole step, that give such values."""
        steps, part = self.row
        parts = range(part + 1) if whole_step else (part,)
        row = [group for each in parts for group in self.suspects.row_of(steps, each)]
        bad, alone = self._bad_samples(self.model_wrapped, row)
        names = self.suspects.note(bad, steps + 1, what, alone=alone, left_out=False)
        together = "" if alone else "no row by itself; together "
        return NotFinite(
            f"{what}, from {together}{names} (all: {self.suspects.path}); the weights are those of "
            f"the step before. {self._advice()}"
        )

    def _advice(self) -> str:
        assignment = option("--set", "overrides=")
        return (
            f"{option(*RESUME)} goes on from there: with {assignment} train.skip_bad_rows=true without such rows, or "
            f"with a lower learning_rate or max_grad_norm of the stage {self.stage.name}"
        )

    def save_at_once(self) -> None:
        """Write a checkpoint of the last whole step, if there is none yet: what was learnt so far is kept."""
        step = self.state.global_step
        there = Path(self.args.output_dir).with_name(f"checkpoint-{step}").exists()
        if step and not there and self.accelerator.num_processes == 1:
            self._save_checkpoint(self.model, trial=None)
            self.callback_handler.on_save(self.args, self.state, self.control)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over items of the stage's objective; trl's own loss where the objective leaves it to trl."""
        batch: Batch = inputs
        objective = self.stage.objective
        found: BatchLoss | None = objective.module.loss(
            model, self.accelerator.unwrap_model(model), batch, objective.options
        )
        if found is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.accuracies.append(found.right / max(found.count, 1))
        weight = found.items if found.weight is None else found.weight
        for name, value in found.figures.items():
            self.figures.setdefault(name, []).append((value, weight))
        tokens = torch.tensor(batch["input_ids"].numel(), device=batch["input_ids"].device)
        self.tokens += int(self.accelerator.gather_for_metrics(tokens).sum())
        # As in trl: items are counted over all processes, and gradients are averaged over them.
        loss = found.total / (num_items_in_batch if num_items_in_batch else max(found.items, 1))
        loss = loss * (self.accelerator.num_processes if num_items_in_batch is not None else 1)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Any:
        """transformers' count of learned tokens, or the items that the collator has counted."""
        if not batch_samples or "items" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        count = torch.tensor(sum(batch["items"] for batch in batch_samples), device=device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def create_optimizer(self, model: Any = None) -> Any:
        """transformers' own; where parts have their own learning rates, a group per part."""
        if not self.stage.learning_rates or self.optimizer is not None:
            return super().create_optimizer(model)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        decayed = set(self.get_decay_parameter_names(self.model))
        names = {id(p): name for name, p in self.model.named_parameters()}
        groups = []
        for role, parameters in self.parts.items():
            for decays in (True, False):
                chosen = [p for p in parameters if (names[id(p)] in decayed) == decays]
                rate = rate_of(role, self.stage)
                groups.append({"params": chosen, "lr": rate, "weight_decay": self.args.weight_decay * decays})
        self.optimizer = kind([group for group in groups if group["params"]], **options)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.accuracies:
            logs["mean_token_accuracy"] = sum(self.accuracies) / len(self.accuracies)
            logs["num_tokens"] = self.tokens
            self.accuracies.clear()
        for name, values in self.figures.items():
            logs[name] = sum(value * items for value, items in values) / max(sum(items for _, items in values), 1)
        self.figures.clear()
        if "loss" in logs:
            self._add_speed_and_rates(logs)
        super().log(logs, start_time)

    def _add_speed_and_rates(self, logs: dict[str, float]) -> None:
        """Tokens a second since the first step of this process, which warms up; parts' own learning rates."""
        tokens, now = self.tokens + self._total_train_tokens, perf_counter()
        if self.first_log is None:
            self.first_log = tokens, now
        else:
            logs["tokens_per_second"] = (tokens - self.first_log[0]) / (now - self.first_log[1])
        if self.stage.learning_rates:
            factor = logs["learning_rate"] / rate_of(next(iter(self.parts)), self.stage)  # the first part's is logged
            logs |= {f"learning_rate/{role}": factor * rate_of(role, self.stage) for role in self.parts}

    def report(self, values: dict[str, float]) -> None:
        """Show values to trackers beside the log, of which an entry is a step."""
        self.callback_handler.on_log(self.args, self.state, TrainerControl(), logs=values)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with writing(Path(self.args.output_dir).parent, "a checkpoint"):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            if not all(bool(torch.isfinite(p).all()) for p in self._trained()):
                raise TrainingError(
                    f"a weight isn't finite after step {self.state.global_step}; no checkpoint was written. "
                    f"{self._advice()}"
                )
            save_trained(self.model, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        load_trained(self.model, checkpoint)
        counts = [entry["num_tokens"] for entry in read_json(checkpoint / "trainer_state.json")["log_history"]]
        self.tokens = self._total_train_tokens = int(counts[-1])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """With other rates than the checkpoint's, where the recipe has been given others since."""
        if checkpoint is None or self.optimizer is None or self.lr_scheduler is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        rates = [group["initial_lr"] for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] *= rate / group["initial_lr"]
            group["initial_lr"] = rate
        self.lr_scheduler.base_lrs = rates
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is written once, where the adapter is published."""


def rate_of(role: str, stage: Stage) -> float:
    """The learning rate of a part: its own ('projectors.image'), that of its kind ('projectors'), or the stage's."""
    return stage.learning_rates.get(role, stage.learning_rates.get(role.partition(".")[0], stage.learning_rate))


class FiniteGradients(TrainerCallback):
    """Stops before an optimizer step whose gradients aren't finite. Under fp16 the scaler skips single such steps, and
    only many in a row stop the run.
    """

    def __init__(self, parts: dict[str, list[nn.Parameter]]) -> None:
        self.parts = parts
        self.skipped = 0
        self.error: Callable[[str], TrainingError] = TrainingError  # what to raise, by what was seen

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.skipped = self.skipped + 1 if getattr(optimizer, "step_was_skipped", False) else 0
        if self.skipped >= SKIPPED:
            raise TrainingError(
                f"the last {SKIPPED} steps up to {state.global_step} were skipped: their gradients weren't finite in "
                "float16. Lower the learning rate, or train on a device with bfloat16"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = [p for parameters in self.parts.values() for p in parameters]
        if not args.fp16 and not finite_gradients(parameters):  # of which part is unknown: they were clipped together
            raise self.error(f"a gradient isn't finite at step {state.global_step + 1}")


def _for_other_items(gradients: Mapping[nn.Parameter, Tensor], items: Any, others: Any) -> dict[nn.Parameter, Tensor]:
    """Gradients of a mean over `items` as those of a mean over `others`."""
    factor = float(items / others) if items is not None and others else 1.0
    return {parameter: gradient * factor for parameter, gradient in gradients.items()}


def finite_gradients(parameters: Sequence[nn.Parameter]) -> bool:
    norms = [p.grad.norm() for p in parameters if p.grad is not None]
    return all(bool(torch.isfinite(norm)) for norm in norms)


def refuse_several_gpus() -> None:
    """Raises TrainingError where one process sees several GPUs: the Trainer would spread the model over all of them."""
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise TrainingError(f"{torch.cuda.device_count()} GPUs are visible: choose one, CUDA_VISIBLE_DEVICES=0")
