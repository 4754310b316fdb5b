"""trl's SFTTrainer, subclassed once: only what was trained is saved, checkpoints are whole or absent, and nothing that
isn't finite reaches the weights.
"""

import math
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import reduce
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from finetune.common.errors import Interrupted, TrainingError
from finetune.common.registry import load_part
from finetune.common.run_folder import whole_folder
from finetune.model.adapter import load_trained, save_trained
from finetune.model.composite import MultimodalModel


class StageTrainer(SFTTrainer):
    model: Any
    args: Any
    accelerator: Any
    temperature: float = 1.0
    _staging: Path | None = None  # where a checkpoint is being written
    learning_rates: Mapping[str, float] = {}
    parts: Mapping[str, list[torch.nn.Parameter]] = {}

    def create_optimizer(self, model: Any = None) -> Any:
        """transformers' own; where parts have their own learning rates, a group per part."""
        if not self.learning_rates or self.optimizer is not None:
            return super().create_optimizer(model)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        decayed = set(self.get_decay_parameter_names(self.model))
        names = {id(p): name for name, p in self.model.named_parameters()}
        groups = []
        for role, parameters in self.parts.items():
            for decays in (True, False):
                chosen = [p for p in parameters if (names[id(p)] in decayed) == decays]
                rate = rate_of(role, self.learning_rates, self.args.learning_rate)
                groups.append({"params": chosen, "lr": rate, "weight_decay": self.args.weight_decay * decays})
        self.optimizer = kind([group for group in groups if group["params"]], **options)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """trl's, on logits of learnt tokens only; where there is a teacher, the KL divergence from it; where there are
        heads with weights or weighed losses, the sum of all.
        """
        if "teacher" not in inputs and "heads" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        tokens = torch.tensor(inputs["input_ids"].numel(), device=inputs["input_ids"].device)
        self._total_train_tokens += self.accelerator.gather_for_metrics(tokens).sum().item()
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        if "teacher" in inputs:
            outputs = model(**inputs, temperature=self.temperature)
            total, right, count = outputs["loss"], outputs["agreement"], inputs["label_rows"].numel()
        else:
            total, right, count = self._mixed_loss(model, inputs)
        self._metrics["train"]["mean_token_accuracy"].append(float(right) / max(count, 1))
        count = inputs.get("items", count)
        # As in trl: items are counted over all processes, and gradients are averaged over them.
        loss = total / (num_items_in_batch if num_items_in_batch else max(count, 1))
        loss = loss * (self.accelerator.num_processes if num_items_in_batch is not None else 1)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _mixed_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, float, int]:
        """The sum over learnt tokens and samples of their weighed losses; how many tokens and labels are right, and of
        how many. Numbers and sets of labels aren't right or wrong.
        """
        batch = {key: value for key, value in inputs.items() if key not in ("heads", "loss_weights", "items")}
        heads = inputs["heads"]
        rows = {name: head["rows"] for name, head in heads.items()}
        outputs = model(**batch, head_rows=rows, use_cache=False, fused_lm_head=True)
        total = -(outputs.log_probs * inputs["loss_weights"]).sum()
        right = float(outputs.is_top1.sum())
        own, told = self.accelerator.unwrap_model(model), int(outputs.label_mask.sum())
        for name, head in heads.items():
            scores, ask = own.head_scores[name], own.asks[name]
            part = load_part("heads", ask.head[0])
            losses = part.loss(scores, head["targets"], head["groups"], ask.settings, ask.head[1])
            total = total + (losses * head["weights"]).sum()
            if scores.shape[1] > 1 and not ask.settings.several:
                right += float((scores.argmax(1) == head["targets"].argmax(1)).sum())
                told += len(scores)
        return total, right, told

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """transformers' count of learnt tokens; with heads, of samples that these answer too."""
        if not batch_samples or "items" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        count = torch.tensor(sum(batch["items"] for batch in batch_samples), device=device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """One checkpoint in place of the last, under its name only once all of it is on disk. Every process adds its
        own random state.
        """
        name = f"checkpoint-{self.state.global_step}"
        folder = Path(self.args.output_dir)
        first = self.is_world_process_zero()
        with whole_folder(folder / name) if first else nullcontext(folder / f"{name}.partial") as partial:
            self._staging = partial
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if first:
                for path in (partial / name).iterdir():
                    path.rename(partial / path.name)
                (partial / name).rmdir()
        if first:
            for older in folder.glob("checkpoint-*"):
                if older.name != name:
                    shutil.rmtree(older)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is written once, where the adapter is published."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        save_trained(self.model, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.model, Path(resume_from_checkpoint))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; the weights are those of the step "
                "before. Lower the learning rate, or train in bfloat16; --resume goes on from the last checkpoint"
            )
        return loss


def rate_of(role: str, rates: Mapping[str, float], default: float) -> float:
    """The learning rate of a part: its own ('projectors.image'), that of its kind ('projectors'), or the stage's."""
    return rates.get(role, rates.get(role.partition(".")[0], default))


SKIPPED = 20  # steps in a row; the scaler's first scale of 2^16 is halved each time, so that a few are usual


class FiniteGradients(TrainerCallback):
    """Stops before an optimizer step whose gradients aren't finite. Under fp16 the scaler skips single such steps, and
    only many in a row stop the run.
    """

    def __init__(self, parts: dict[str, list[torch.nn.Parameter]]) -> None:
        self.parts = parts
        self.skipped = 0

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.skipped = self.skipped + 1 if getattr(optimizer, "step_was_skipped", False) else 0
        if self.skipped >= SKIPPED:
            raise TrainingError(
                f"the last {SKIPPED} steps up to {state.global_step} were skipped: their gradients weren't finite in "
                "float16. Lower the learning rate, or train where there is bfloat16"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16:
            return
        norms = [p.grad.norm() for parameters in self.parts.values() for p in parameters if p.grad is not None]
        if not all(torch.isfinite(norm) for norm in norms):  # of which part can't be told: they were clipped together
            raise TrainingError(
                f"a gradient isn't finite at step {state.global_step + 1}; the weights are those of the step before. "
                "Lower the learning rate; --resume goes on from the last checkpoint"
            )


class StopBetweenSteps(TrainerCallback):
    """Ctrl-C ends the step, writes a checkpoint and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            self._before = signal.signal(signal.SIGINT, self._ask)
        except ValueError:  # not in the main thread: there's no Ctrl-C to catch
            self._before = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:  # all stop after the same step, whichever was told first
            flag = torch.tensor(float(self.asked), device=args.device)
            self.asked = bool(reduce(flag, "sum"))
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Also called where training ends by an error."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def refuse_several_gpus() -> None:
    """Raises TrainingError where one process sees several GPUs: the Trainer would spread the model over all of them."""
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise TrainingError(f"{torch.cuda.device_count()} GPUs are visible: choose one, CUDA_VISIBLE_DEVICES=0")


def train_stage(
    model: MultimodalModel,
    tokenizer: Any,
    *,
    rows: Sequence[Sequence[int]],
    collator: Callable[..., dict[str, Any]],
    parts: dict[str, list[torch.nn.Parameter]],
    folder: Path,
    resume_from: Path | None,
    learning_rate: float,
    learning_rates: Mapping[str, float],
    distill_temperature: float | None,
    scheduler: str,
    warmup: float,
    weight_decay: float,
    max_grad_norm: float,
    optimizer: str,
    accumulate: int,
    save_every_n_steps: int,
    workers: int,
    seed: int,
    dtype: torch.dtype,
    callbacks: Sequence[TrainerCallback],
) -> list[dict[str, float]]:
    """Train what has requires_grad on `rows` (sample numbers), in their order; the log, an entry a step.

    Raises Interrupted after Ctrl-C, with a whole checkpoint on disk, and TrainingError on a value that isn't finite.
    """
    on_gpu = next(model.parameters()).is_cuda
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,  # the rows of all epochs are laid out in `rows`
        train_sampling_strategy="sequential",
        learning_rate=learning_rate,
        lr_scheduler_type=scheduler,
        warmup_steps=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        optim=optimizer,
        bf16=on_gpu and dtype == torch.bfloat16,
        fp16=on_gpu and dtype == torch.float16,
        use_cpu=not on_gpu,
        gradient_checkpointing=False,  # switched on in the LLM, where it belongs
        save_strategy="steps",
        save_steps=save_every_n_steps,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=seed,
        data_seed=seed,
        dataloader_num_workers=workers,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        label_names=["labels"],
        ddp_find_unused_parameters=False,  # all that trains is used in every step, be it times zero
        report_to=[],
        disable_tqdm=True,
    )
    stop = StopBetweenSteps()
    filler = -len(rows) % arguments.world_size
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(
            {
                "samples": [list(rows[number % len(rows)]) for number in range(len(rows) + filler)],
                "filler": [False] * len(rows) + [True] * filler,
            }
        ),
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[FiniteGradients(parts), stop, *callbacks],
    )
    trainer.learning_rates, trainer.parts = learning_rates, parts
    trainer.temperature = distill_temperature or 1.0
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "out of GPU memory. In this order: train.checkpoint_every_n_layers: 1, a smaller train.tokens_per_batch "
            "(with more train.accumulate), optimizer: paged_adamw_8bit, model.llm.quantize: nf4. "
            "--resume needs the same recipe: begin anew with --run"
        ) from error
    finally:
        for watching in (stop, *callbacks):
            getattr(watching, "close", lambda: None)()
        for patched in ("forward", "_original_forward"):  # trl's fused head and accelerate's autocast
            model.__dict__.pop(patched, None)
    ended = any(getattr(watching, "ended", False) for watching in callbacks)
    if stop.asked and not ended and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}")
    return [entry for entry in trainer.state.log_history if "loss" in entry and math.isfinite(entry["loss"])]
