"""A disk that gets full while a checkpoint is written: the last good one is whole, the message has path and bytes, and
with room the run goes on to the weights that it would have had.
"""

import ctypes
import os
import resource
import subprocess
from multiprocessing import get_context
from pathlib import Path

import pytest
from cli import cli
from packed import composite_with_lora, training_of
from test_killed_saves import in_a_fork, same_as
from tiny import tiny_recipe

from finetune.common import disk
from finetune.common.errors import FinetuneError
from finetune.common.run_folder import RunFolder, damage
from finetune.training import run_stage as run_stage_module
from finetune.training.run_stage import run_stage

pytestmark = pytest.mark.slow
NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000


def own_tmpfs(folder: Path, size: int) -> None:
    """Mount one of so many bytes, seen by this process only. Raises OSError where that isn't allowed."""
    user = os.getuid()
    flags = NEW_MOUNTS if user == 0 else NEW_MOUNTS | NEW_USER
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True, capture_output=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True, capture_output=True)


def trains(folder: Path, kind: str, size: int, results) -> None:
    """A stage on a full disk; puts (message, names of whole checkpoints), then goes on with room."""
    try:
        if kind == "disk":
            own_tmpfs(folder, size)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    except (OSError, subprocess.CalledProcessError) as error:
        results.put(("not allowed", str(error)))
        return
    run_stage_module.refuse_full = lambda *arguments: None  # the look before it begins
    run = RunFolder(folder)
    message = ""
    try:
        run_stage(run, training_of(composite_with_lora(), run.checkpoints / "tune"), None)
    except FinetuneError as error:
        message = str(error)
    whole = [path.name for path in run.checkpoints_of("tune") if damage(path) is None]
    if kind == "disk":
        subprocess.run(["mount", "-o", "remount,size=100m", str(folder)], check=True)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    run_stage(run, training_of(composite_with_lora(), run.checkpoints / "tune"), None)
    results.put((message, whole, same_as(WHOLE[0], folder)))


WHOLE: list[Path] = []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert in_a_fork(folder) == 0
    WHOLE.append(folder)
    stage = folder / "checkpoints" / "tune" / "final"
    return sum(path.stat().st_size for path in stage.rglob("*"))


@pytest.mark.parametrize("kind", ["disk", pytest.param("size", marks=pytest.mark.full)])
def test_a_full_disk_costs_nothing_that_was_learnt(kind, whole, tmp_path, full, tried):
    context = get_context("fork")
    # A checkpoint is four to five times `final`: while the first is written, and while the second is.
    kept: list[int] = []
    shares = {"disk": [2.0, 4.0, 7.0, 9.0, 10.0], "size": [0.1, 0.3, 0.5, 0.7, 0.9]}[kind]
    for share in shares if full else shares[2:3]:
        folder, results = tmp_path / str(share), context.SimpleQueue()
        folder.mkdir()
        process = context.Process(target=trains, args=(folder, kind, int(share * whole), results))
        process.start()
        process.join()
        assert process.exitcode == 0
        message, *found = results.get()
        if message == "not allowed":
            pytest.skip(found[0])
        found, same = found
        assert str(folder) in message and "bytes are free" in message, (share, message)
        assert same, share
        kept.append(len(found))
    assert kept == sorted(kept) and (kind == "size" or kept[-1] > 0)
    tried(f"{kind} full at {len(shares)} places of a stage", "path and bytes named; resumed to the same weights")


def test_room_is_looked_at_before_training(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path)
    real = disk.free_bytes
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1000 if "checkpoints" in str(folder) else real(folder))
    done = cli("train", recipe, cwd=tmp_path)
    assert done.returncode == 1
    assert "checkpoints" in done.stderr and "1,000 are free" in done.stderr and "tune: step" not in done.stderr
