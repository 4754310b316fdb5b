"""One stage of training, or what is left of it."""

import shutil
from array import array
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

from accelerate import PartialState

from finetune.common.disk import refuse_full, writing
from finetune.common.errors import Interrupted
from finetune.common.progress import console
from finetune.common.run_folder import RunFolder, read_json, whole_folder, write_hashes, write_json
from finetune.evaluation.results import StageResult
from finetune.model.adapter import load_trained, save_trained
from finetune.model.trainable import set_trainable
from finetune.training.checkpoints import KEPT, newest_whole, seconds_of, step_of
from finetune.training.micro_batches import halved_of
from finetune.training.stage_training import StageTraining, suspects_of
from finetune.training.steps import FEW_STEPS
from finetune.training.stopping import StopBetweenSteps
from finetune.training.trainer import train_stage
from finetune.training.training_bar import LiveCurve, TrainingBar
from finetune.training.validation import ValidationCallback
from finetune.training.watch import warnings_of


def run_stage(folder: RunFolder, training: StageTraining, validation: ValidationCallback | None) -> StageResult:
    """Train a stage, from its newest whole checkpoint if there is one; it ends on its best weights where it is
    validated. Raises Interrupted where a signal has ended it, with all that it has trained on disk.
    """
    name, processes = training.stage.name, PartialState()
    trained = set_trainable(training.model, training.stage.trains)
    if processes.is_main_process:
        folder.remove_torn(name)
    processes.wait_for_everyone()
    checkpoint = newest_whole(folder, name)
    if checkpoint is not None and checkpoint.name == "final":
        load_trained(training.model, checkpoint)
        console.print(f"{name}: done before")
        done = StageResult.model_validate(read_json(checkpoint / "result.json"))
        return done.model_copy(update={"seconds_before": done.seconds or 0.0})
    announce(training, trained)
    if processes.is_main_process:
        needed = room_needed(training, trained, len(folder.checkpoints_of(name)))
        refuse_full(training.folder, needed, "the checkpoints of this stage")
    begin, before = perf_counter(), seconds_of(checkpoint)
    with StopBetweenSteps() as stop:
        try:
            log = _trained(training, stop, checkpoint, validation)
        except Interrupted as error:
            message = f"{name}: {error}; the checkpoint is in {folder.path}"
            raise Interrupted(message, error.signal_number, folder.path) from None
        result = _finished(training, trained, log, validation)
        result = result.model_copy(update={"seconds": before + perf_counter() - begin, "seconds_before": before})
        if processes.is_main_process:
            with writing(training.folder, "the stage's weights"):
                finish(training, result)
        processes.wait_for_everyone()
    if stop.agreed():  # too late for this stage; the next one isn't begun
        raise Interrupted(f"{name}: stopped when it was done", stop.signal_number, folder.path)
    return result


def _finished(
    training: StageTraining,
    trained: dict[str, int],
    log: list[dict[str, float]],
    validation: ValidationCallback | None,
) -> StageResult:
    """The result of a stage that has trained, which ends on its best weights."""
    processes = PartialState()
    best_step = validation.restore_best() if validation else None
    steps = validation.history[-1].step if validation else training.steps  # fewer where it ended early
    rows = islice(training.rows, steps * training.settings.accumulate * processes.num_processes)
    lengths = training.collator.samples.lengths
    tokens = array("q", (lengths[number] for row in rows for group in row for number in group))
    return StageResult(
        losses=[round(entry["loss"], 6) for entry in log],
        token_accuracy=[round(entry["mean_token_accuracy"], 4) for entry in log],
        steps=steps,
        samples=len(tokens) // training.stage.objective.iterations,
        # With the sampled answers, which are in no row.
        tokens=int(log[-1]["num_tokens"]) if training.rollouts else sum(tokens),
        figures={name: [entry.get(name) for entry in log] for name in training.stage.objective.module.FIGURES},
        left_out=suspects_of(training).left_out(),
        pieces=max((one.pieces for one in halved_of(training)), default=1),
        warnings=[f"step {one.step:,}: {one.text}" for one in warnings_of(training)],
        trained_weights=trained,
        validation=validation.history if validation else [],
        best_step=best_step,
    )


def room_needed(training: StageTraining, trained: Mapping[str, int], there: int) -> int:
    """Bytes that a stage writes while `KEPT` checkpoints, one more and the adapter are on the disk; `there`: how many
    are already. Weights have 4 bytes, and the optimizer's two states as many, or one each.
    """
    weights = 4 * sum(trained.values())
    checkpoint = weights + 2 * sum(trained.values()) * (1 if "8bit" in training.stage.optimizer else 4)
    return max(1, KEPT + 1 - there) * checkpoint + weights


def announce(training: StageTraining, trained: dict[str, int]) -> None:
    stage = training.stage
    console.print(f"{stage.name}: trains " + ", ".join(f"{role} ({count:,})" for role, count in trained.items()))
    if training.steps < FEW_STEPS:
        console.print(
            f"{stage.name}: only {training.steps} optimizer step{'s' * (training.steps > 1)}, hardly enough to learn "
            f"from: lower train.tokens_per_batch or raise the stage's epochs (now {stage.epochs})"
        )


def _trained(
    training: StageTraining,
    stop: StopBetweenSteps,
    checkpoint: Path | None,
    validation: ValidationCallback | None,
) -> list[dict[str, float]]:
    """The log, an entry a step."""
    name, done = training.stage.name, step_of(checkpoint) if checkpoint else 0
    if done:
        console.print(f"{name}: goes on after step {done:,} of {training.steps:,}")
    if validation and checkpoint is not None:
        validation.resume(done)
        if validation.exhausted:  # interrupted after the pass that had ended it: nothing is left to train
            return [entry for entry in read_json(checkpoint / "trainer_state.json")["log_history"] if "loss" in entry]
    callbacks: list[Any] = [TrainingBar(name, training.steps), LiveCurve(name), *([validation] if validation else [])]
    return train_stage(training, stop, checkpoint, callbacks)


def finish(training: StageTraining, result: StageResult) -> None:
    """Write `final`, in place of the checkpoints."""
    final = training.folder / "final"
    with whole_folder(final) as partial:
        save_trained(training.model, partial)
        write_json(partial / "result.json", result.model_dump())
        write_hashes(partial)
    for old in [*training.folder.glob("checkpoint-*"), *training.folder.glob("best")]:
        shutil.rmtree(old)
