"""One stage of training."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from accelerate import PartialState

from finetune.common.errors import Interrupted
from finetune.common.progress import TrainingBar, console
from finetune.common.run_folder import RunFolder, read_json, whole_folder, write_json
from finetune.model import adapter
from finetune.model.build import Parts
from finetune.model.composite import MultimodalModel
from finetune.model.trainable import set_trainable, trained_parts
from finetune.training.collate import Collator
from finetune.training.trainer import train_stage
from finetune.training.validation import Validation

FEW_STEPS = 50


def run_stage(
    folder: RunFolder,
    model: MultimodalModel,
    parts: Parts,
    collator: Collator,
    rows: Sequence[Sequence[int]],
    lengths: Sequence[int],
    stage: Mapping[str, Any],
    validation: Validation | None,
    *,
    accumulate: int,
    save_every_n_steps: int,
    workers: int,
    seed: int,
) -> dict[str, Any]:
    """One stage, or what is left of it, ending on its best weights where it is validated. Returns its losses (one a
    step), steps, tokens and seconds.
    """
    trained = set_trainable(model, stage["trains"])
    processes = PartialState()
    steps = -(-len(rows) // (accumulate * processes.num_processes))
    if processes.is_main_process:
        folder.remove_torn(stage["name"])
    processes.wait_for_everyone()
    checkpoint = folder.newest_checkpoint(stage["name"])
    if checkpoint is not None and checkpoint.name == "final":
        adapter.load_trained(model, checkpoint)
        console.print(f"{stage['name']}: done before")
        return read_json(checkpoint / "result.json")
    console.print(f"{stage['name']}: trains " + ", ".join(f"{role} ({count:,})" for role, count in trained.items()))
    if steps < FEW_STEPS:
        console.print(
            f"{stage['name']}: only {steps} optimizer step{'s' * (steps > 1)}, hardly enough to learn from: lower "
            f"train.tokens_per_batch or raise the stage's epochs (now {stage['epochs']})"
        )
    if validation and checkpoint is not None:
        validation.resume(int(checkpoint.name.rpartition("-")[2]))
    begin = perf_counter()
    try:
        # Stopped after the look that had ended it: nothing is left to train.
        log = (
            log_of(checkpoint)
            if validation and validation.exhausted
            else train_stage(
                model,
                parts.tokenizer,
                rows=rows,
                collator=collator,
                parts=trained_parts(model, stage["trains"]),
                folder=folder.checkpoints / stage["name"],
                resume_from=checkpoint,
                accumulate=accumulate,
                save_every_n_steps=save_every_n_steps,
                workers=workers,
                seed=seed,
                dtype=parts.dtype,
                callbacks=[TrainingBar(stage["name"], steps), *([validation] if validation else [])],
                distill_temperature=stage["distill"]["temperature"] if stage["distill"] else None,
                # The first of the warmup's steps has a rate of zero: too much where the whole stage is a few steps.
                warmup=stage["warmup"] if stage["warmup"] * steps >= 1 else 0.0,
                **{
                    key: value
                    for key, value in stage.items()
                    if key not in {"name", "trains", "epochs", "sources", "distill", "warmup"}
                },
            )
        )
    except Interrupted as error:
        raise Interrupted(
            f"{stage['name']}: {error}; go on with --resume --run {folder.path}, and the same --set"
        ) from None
    best_step = validation.restore_best() if validation else None
    done = validation.history[-1]["step"] if validation else steps  # fewer where it ended early
    trained_rows = rows[: done * accumulate * processes.num_processes]
    result = {
        "losses": [round(entry["loss"], 6) for entry in log],
        "token_accuracy": [round(entry["mean_token_accuracy"], 4) for entry in log],
        "steps": done,
        "samples": sum(len(row) for row in trained_rows),
        "tokens": sum(lengths[number] for row in trained_rows for number in row),
        "seconds": perf_counter() - begin,
        "trained_weights": trained,
        "validation": validation.history if validation else [],
        "best_step": best_step,
    }
    final = folder.checkpoints / stage["name"] / "final"
    if processes.is_main_process:
        with whole_folder(final) as partial:
            adapter.save_trained(model, partial)
            write_json(partial / "result.json", result)
        for old in [*final.parent.glob("checkpoint-*"), *final.parent.glob("best")]:
            shutil.rmtree(old)
    processes.wait_for_everyone()
    return result


def log_of(checkpoint: Path | None) -> list[dict[str, float]]:
    """The log that a checkpoint keeps, an entry a step."""
    found = read_json(checkpoint / "trainer_state.json")["log_history"] if checkpoint else []
    return [entry for entry in found if "loss" in entry]
