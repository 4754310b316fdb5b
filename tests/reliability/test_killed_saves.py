"""A training that is killed at every file that it writes, renames and removes, and at random times: it goes on, without
a word of help, to the weights of one that nothing has killed.
"""

import os
import pickle
import random
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from packed import composite_with_lora, train_composite, training_of
from safetensors.torch import load_file

from finetune.common.errors import FinetuneError
from finetune.common.run_folder import RunFolder, damage, write_hashes
from finetune.training.run_stage import run_stage

pytestmark = pytest.mark.slow
WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def train_stage_in(folder: Path, dies_at: int = 0, counted: Path | None = None) -> None:
    """The whole of a stage, killed before the `dies_at`th of its WRITES; `counted`: where their number is written."""
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        if event in WRITES and str(folder) in str(arguments[0]):
            seen += 1
            if seen == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if dies_at or counted:
        sys.addaudithook(watch)
    run = RunFolder(folder)
    run_stage(run, training_of(composite_with_lora(), run.checkpoints / "tune"), None)
    if counted:
        counted.write_text(str(seen))


def in_a_fork(*arguments, killed_after: float | None = None) -> int:
    process = get_context("fork").Process(target=train_stage_in, args=arguments)
    process.start()
    if killed_after is not None:
        time.sleep(killed_after)
        process.kill()
    process.join()
    return process.exitcode


def same_as(whole: Path, folder: Path) -> bool:
    for name in ("adapter_model.safetensors", "projectors.safetensors"):
        left, right = (load_file(run / "checkpoints" / "tune" / "final" / name) for run in (whole, folder))
        if left.keys() != right.keys() or not all(torch.equal(left[key], right[key]) for key in left):
            return False
    return damage(folder / "checkpoints" / "tune" / "final") is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder of a stage that nothing has killed, how many WRITES it took, seconds)."""
    folder = tmp_path_factory.mktemp("whole")
    begin = time.monotonic()
    assert in_a_fork(folder, 0, folder / "count") == 0
    return folder, int((folder / "count").read_text()), time.monotonic() - begin


def test_killed_at_a_file_boundary(whole, tmp_path, full, tried):
    expected, writes, _ = whole
    assert writes > 50
    places = range(1, writes + 1) if full else random.Random(3).sample(range(1, writes + 1), 2)
    for place in places:
        folder = tmp_path / str(place)
        assert in_a_fork(folder, place) == -signal.SIGKILL
        for path in RunFolder(folder).checkpoints_of("tune")[:2]:  # an older one may be half removed
            assert damage(path) is None, (place, damage(path))
        assert in_a_fork(folder) == 0 and same_as(expected, folder), place
    tried(
        f"killed at {len(places)} of {writes} file operations of a stage, and resumed", "the same weights, to the bit"
    )


@pytest.mark.full
def test_killed_at_any_time(whole, tmp_path, full, tried):
    expected, _, seconds = whole
    generator, times = random.Random(4), 30
    for number in range(times):
        folder, kills = tmp_path / str(number), 0
        while kills < 3 and in_a_fork(folder, killed_after=generator.uniform(0.3, 1.0) * seconds) != 0:
            kills += 1
        assert in_a_fork(folder) == 0 and same_as(expected, folder), number
    tried(f"{times} stages killed at random times, up to three times each, resumed", "the same weights, to the bit")


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def names_of_a_checkpoint() -> list[str]:
    models = ["adapter_model.safetensors", "projectors.safetensors", "adapter_config.json"]
    return [*models, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "seconds.json"]


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_nothing_in_a_checkpoint_is_executed(kind, tmp_path, tried):
    """By whoever can write to it, with hashes that fit."""
    run, planted = RunFolder(tmp_path / "run"), tmp_path / "planted"
    train_composite(composite_with_lora(), run.checkpoints / "tune", rows=[[[0], [1]], [[2]]])
    (checkpoint,) = run.checkpoints_of("tune")
    there = {path.name for path in checkpoint.iterdir()}
    assert there == {*names_of_a_checkpoint(), "sha256.json"}  # a new file has to be tried too
    for name in sorted(there):
        content = (checkpoint / name).read_bytes()
        if kind == "pickle":
            (checkpoint / name).write_bytes(pickle.dumps(Planted(planted)))
        else:
            torch.save({"state": Planted(planted)}, checkpoint / name)
        if name != "sha256.json":
            write_hashes(checkpoint)
        if name == "adapter_config.json":  # isn't read by a training
            assert damage(checkpoint) is None
        else:
            with pytest.raises(FinetuneError):
                run_stage(run, training_of(composite_with_lora(), run.checkpoints / "tune"), None)
        assert not planted.exists(), name
        (checkpoint / name).write_bytes(content)
    write_hashes(checkpoint)
    run_stage(run, training_of(composite_with_lora(), run.checkpoints / "tune"), None)  # as it was, it goes on
    pickle.loads(pickle.dumps(Planted(planted)))
    assert planted.exists()  # what was planted works
    tried(f"a {kind} file in place of each of {len(there)} files of a checkpoint", "nothing executed, each refused")
