"""What one stage trains with, and the same as trl takes it."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from datasets import Dataset
from trl import SFTConfig

from finetune.model.composite import MultimodalModel
from finetune.recipe.schema import Stage, Train
from finetune.training.checkpoints import KEPT, STAGING
from finetune.training.collate import Collator
from finetune.training.pack import Row, Rows
from finetune.training.rollouts import Rollouts
from finetune.training.suspects import FILE, Suspects


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
    def data(self) -> Path:
        """RUN/data."""
        return self.folder.parents[1] / "data"

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        result: int = -(-len(self.rows) // (self.settings.accumulate * PartialState().num_processes))
        return result


def suspects_of(training: StageTraining) -> Suspects:
    path = training.data / FILE
    return Suspects(path, training.stage.name, training.rows, training.collator, training.settings.accumulate)


def packed_rows(rows: Sequence[Row]) -> Dataset:
    """Rows for all processes: the last ones are filled up with rows from which nothing is learned."""
    packed = rows if isinstance(rows, Rows) else Rows.of(rows)
    filler = -len(packed) % PartialState().num_processes
    by_group = pa.ListArray.from_arrays(_arrow(packed.groups), _arrow(packed.samples))
    by_row = pa.ListArray.from_arrays(_arrow(packed.ends), by_group)
    numbers = np.arange(len(packed) + filler)
    groups = by_row.take(pa.array(numbers % len(packed))) if filler else by_row
    return Dataset.from_dict({"groups": groups, "filler": pa.array(numbers >= len(packed))})


def _arrow(numbers: "array[int]") -> pa.Array:
    """The same memory as an Arrow array."""
    return pa.array(np.frombuffer(numbers, f"i{numbers.itemsize}"))


def trainer_arguments(training: StageTraining) -> SFTConfig:
    stage, settings = training.stage, training.settings
    on_gpu = next(training.model.parameters()).is_cuda
    fp16 = on_gpu and training.dtype == torch.float16
    # Not in float16: accelerate doesn't see which steps a fused optimizer skips because of the loss scale.
    fused = stage.optimizer == "adamw_torch" and not fp16
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
        optim="adamw_torch_fused" if fused else stage.optimizer,
        bf16=on_gpu and training.dtype == torch.bfloat16,
        fp16=fp16,
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
        report_to=[tracker for tracker in settings.track if tracker != "tensorboard"],  # it has a callback of its own
        run_name=f"{training.folder.parents[1].name}-{stage.name}",
        project="finetune",
        disable_tqdm=True,
    )
