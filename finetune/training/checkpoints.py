"""Checkpoints of a stage: written whole or not at all, with the hashes of their files, and read back only if whole."""

import os
import shutil
from pathlib import Path
from time import perf_counter
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from finetune.common.disk import writing
from finetune.common.errors import OVERWRITE, RESUME, TrainingError, option
from finetune.common.progress import console
from finetune.common.run_folder import RunFolder, damage, flush, read_json, to_disk, write_hashes, write_json

STAGING = "writing.partial"  # where checkpoints are written before they appear under their own names


SECONDS = "seconds.json"
KEPT = 2  # where the newest is damaged, the one before is there


def seconds_of(checkpoint: Path | None) -> float:
    """What the stage had taken until the checkpoint; 0 where that isn't known."""
    path = checkpoint and checkpoint / SECONDS
    return float(read_json(path)["stage"]) if path and path.is_file() else 0.0


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a `checkpoint-N` was written."""
    return int(checkpoint.name.rpartition("-")[2])


class WholeCheckpoints(TrainerCallback):
    """A checkpoint appears under its name only once all processes have written it and its files are hashed. As many as
    `save_total_limit` says are kept; those of later steps are damaged ones that this training went back behind.
    """

    def __init__(self, folder: Path, seconds_before: float = 0.0) -> None:
        """`seconds_before`: what the stage took in earlier parts."""
        self.folder, self.begin = folder, perf_counter() - seconds_before

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # every process adds its own random state
        if PartialState().is_main_process:
            written = self.folder / STAGING / f"checkpoint-{state.global_step}"
            with writing(self.folder, "a checkpoint"):
                write_json(written / SECONDS, {"stage": perf_counter() - self.begin})
                write_hashes(written)
                to_disk(written)
            for path in self.folder.glob("checkpoint-*"):
                if step_of(path) >= state.global_step:
                    shutil.rmtree(path)
            os.replace(written, self.folder / written.name)
            flush(self.folder)
            rotate_checkpoints(str(self.folder), args.save_total_limit)
        PartialState().wait_for_everyone()

    def close(self) -> None:
        if PartialState().is_main_process:
            shutil.rmtree(self.folder / STAGING, ignore_errors=True)


def newest_whole(folder: RunFolder, stage: str) -> Path | None:
    """The newest whole checkpoint of a stage; None if it has none at all. Each damaged one is named.

    Raises TrainingError where all of them are damaged.
    """
    checkpoints = folder.checkpoints_of(stage)
    for path in checkpoints:
        if (found := damage(path)) is None:
            return path
        console.print(f"{stage}: {path.name} is damaged and is left out: {found}")
    if not checkpoints:
        return None
    raise TrainingError(
        f"{stage}: no whole checkpoint is left. If the folder is still being copied or synchronized, wait and try "
        f"again. Otherwise remove {checkpoints[0].parent}, and {option(*RESUME)} begins this stage "
        f"anew; {option(*OVERWRITE)} begins the "
        "whole run anew"
    )
