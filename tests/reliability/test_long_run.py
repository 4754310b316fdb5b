"""A stage of 20,000 steps takes as much memory, and as many open files, at its end as at its beginning."""

import json
import os
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest
from packed import ROWS, composite_with_lora, training_of
from transformers import TrainerCallback

from finetune.common.run_folder import RunFolder
from finetune.training import run_stage as stage_module

pytestmark = [pytest.mark.slow, pytest.mark.full]
STEPS, WARM, EVERY = 20_000, 2_000, 500


class Measured(TrainerCallback):
    """Resident memory and open files, in a bar's place."""

    def __init__(self, path: Path) -> None:
        self.path, self.process, self.seen = path, psutil.Process(), []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= WARM and state.global_step % EVERY == 0:
            files = len(os.listdir("/proc/self/fd"))
            self.seen.append((state.global_step, self.process.memory_info().rss, files))
            self.path.write_text(json.dumps(self.seen))


def trains(folder: Path) -> None:
    run = RunFolder(folder)
    rows = (ROWS * (STEPS // len(ROWS) + 1))[:STEPS]
    training = training_of(composite_with_lora(), run.checkpoints / "tune", rows=rows, save_every_n_steps=1000)
    stage_module.TrainingBar = lambda name, steps: Measured(folder / "measured.json")
    stage_module.run_stage(run, training, None)


def test_memory_and_open_files_stay_flat(tmp_path, tried):
    process = get_context("fork").Process(target=trains, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    seen = json.loads((tmp_path / "measured.json").read_text())
    assert seen[-1][0] == STEPS
    memory, files = [one[1] for one in seen], [one[2] for one in seen]
    grown = max(memory[-4:]) / memory[0] - 1
    assert grown < 0.05, [round(one / 2**20) for one in memory]
    assert len(set(files)) == 1, files
    tried(f"{STEPS:,} steps of a tiny model", f"resident memory {grown:+.1%}, open files constant at {files[0]}")
