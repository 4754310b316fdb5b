"""trl's SFTTrainer, subclassed once: only what was trained is saved, checkpoints are whole or absent, and nothing that
isn't finite reaches the weights.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from finetune.common.disk import writing
from finetune.common.errors import RESUME, Interrupted, OutOfMemory, TrainingError, option
from finetune.common.memory import TRAINING, enough_memory
from finetune.common.run_folder import read_json
from finetune.model.adapter import load_trained, save_trained
from finetune.model.row_plan import by_segments
from finetune.model.trainable import trained_parts
from finetune.recipe.schema import Stage
from finetune.training.bad_rows import BadRows, FiniteGradients, NotFinite
from finetune.training.checkpoints import WholeCheckpoints, seconds_of, step_of
from finetune.training.collate import Batch
from finetune.training.micro_batches import MicroBatches
from finetune.training.objectives import BatchLoss
from finetune.training.pack import Row
from finetune.training.reference import Reference
from finetune.training.rollouts import SaveRollouts
from finetune.training.stage_training import StageTraining, packed_rows, suspects_of, trainer_arguments
from finetune.training.stopping import StopBetweenSteps
from finetune.training.tracked_answers import show_answers
from finetune.training.tracking import end_tracking, tensorboard_callbacks
from finetune.training.watch import StageWatch

FUSED = ("log_probs", "entropy", "is_top1")  # the outputs of its head that trl's SFTTrainer uses
LOGGED = ("_metrics", "_total_train_tokens", "accuracies", "figures", "tokens")  # by trl and here, from batch to batch


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
    rollouts = training.rollouts
    kept = [SaveRollouts(rollouts, training.folder)] if rollouts else []
    callbacks = [
        *boards,
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
        if rollouts:
            rollouts.close()
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
    """What a training ends with that can't go on, as a FinetuneError."""
    try:
        with enough_memory(f"in the stage {trainer.stage.name}, between two steps", TRAINING):
            yield
    except (NotFinite, OutOfMemory):
        trainer.save_at_once()
        raise
    except UnpicklingError:  # transformers loads them with weights_only
        raise TrainingError(
            f"{resume_from}: optimizer.pt, scheduler.pt or rng_state.pth holds something else than tensors and "
            "numbers, and isn't loaded: it wasn't written by a training. Remove this folder; "
            f"{option(*RESUME)} goes on from the checkpoint before"
        ) from None


class StageTrainer(SFTTrainer):
    """A step: `training_step` checks the loss that `compute_loss` gives; the callbacks check gradients and save."""

    model: Any
    args: Any
    accelerator: Any

    def __init__(self, training: StageTraining, parts: dict[str, list[nn.Parameter]], **kwargs: Any) -> None:
        """`parts`: {role: parameters that train}; `kwargs`: trl's own."""
        self.stage, self.rollouts = training.stage, training.rollouts
        self.suspects = suspects_of(training)
        self.row: tuple[int, int] = 0, -1  # steps made, and which of the packed rows of the next one this is
        self.parts = parts
        self.trained = [parameter for own in parts.values() for parameter in own]
        self.accuracies: list[float] = []
        self.figures: dict[str, list[tuple[float, int]]] = {}  # of the batches since the last log, with their items
        self.tokens = 0  # of all processes so far, where the loss isn't trl's own
        self.first_log: tuple[int, float] | None = None  # tokens and seconds
        super().__init__(**kwargs)
        config = self.model.config.get_text_config()
        if self.aux_loss_enabled and not hasattr(config, "num_experts"):  # as trl's fused head calls them
            config.num_experts = config.num_local_experts
        self.bad_rows = BadRows(self, self.suspects, training.settings.skip_bad_rows)
        self.micro_batches = MicroBatches(self, self.suspects, training)
        self.watch = StageWatch(training, parts, self.suspects)
        for callback in (FiniteGradients(parts, self.bad_rows.not_finite), self.watch):
            self.add_callback(callback)
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
        now = self.row[1]

        def loss_of(number: int) -> Tensor:
            """Of a packed row of this step; but for that at hand, from its samples again."""
            row = self.suspects.row_of(self.row[0], number)
            return self.bad_rows.loss(model, inputs if number == now else self.prepared(row), row, num_items_in_batch)

        return self.micro_batches.step(loss_of)

    def prepared(self, row: Row) -> Any:
        """The `Batch` of a packed row, where the model is."""
        return self._prepare_inputs(self.suspects.batch(row))

    def loss_and_gradients(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Of a batch, which is computed at once; the loss is a mean over the items of the step."""
        self.watch.note_batch(inputs)
        planned = "row_plan" in inputs
        with by_segments(self.accelerator.unwrap_model(model).causal_lm) if planned else nullcontext():
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def logged(self) -> dict[str, Any]:
        """What a batch adds to the log."""
        return {name: deepcopy(getattr(self, name)) for name in LOGGED}

    def restore_log(self, logged: Mapping[str, Any]) -> None:
        for name, value in logged.items():
            setattr(self, name, deepcopy(value))

    def restore_gradients(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        for parameter in self.trained:
            parameter.grad = gradients[parameter].clone() if parameter in gradients else None

    def items_of(self, batches: list[Batch]) -> Any:
        """What the loss of a step with these batches is a mean over."""
        return self._get_num_items_in_batch(batches, self.args.device)

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
        batch: Batch = {**inputs, "output_router_logits": True} if self.aux_loss_enabled else inputs
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
        if found.auxiliary is not None:
            rows = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * found.auxiliary / rows
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
            if not all(bool(torch.isfinite(p).all()) for p in self.trained):
                raise TrainingError(
                    f"a weight isn't finite after step {self.state.global_step}; no checkpoint was written. "
                    f"{self.bad_rows.advice()}"
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


def refuse_several_gpus() -> None:
    """Raises TrainingError where one process sees several GPUs: the Trainer would spread the model over all of them."""
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise TrainingError(f"{torch.cuda.device_count()} GPUs are visible: choose one, CUDA_VISIBLE_DEVICES=0")
