"""Two processes and one run folder: the second is refused, and the lock dies with its owner, however that dies."""

import signal
import subprocess
from multiprocessing import get_context

import forked
import pytest
from cli import REAL, cli
from tiny import tiny_recipe

from finetune.common.errors import TrainingError
from finetune.common.run_folder import RunFolder

pytestmark = pytest.mark.slow
STAGE = {"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 5.0e-3, "epochs": 40}


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path, tried):
    recipe = tiny_recipe(tmp_path, train__stages=[STAGE], train__save_every_n_steps=10)
    first = forked.popen([*REAL, "train", str(recipe)], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for line in first.stderr:
        if "tune: step " in line:
            break
    for option in ("--resume", "--overwrite"):
        second = cli("train", recipe, option, cwd=tmp_path)
        assert second.returncode == 1 and "another process is training it" in second.stderr
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    third = cli("train", recipe, "--resume", cwd=tmp_path)
    assert third.returncode == 0 and "tune: goes on after step" in third.stderr, third.stderr
    tried("two processes in one run folder", "the second is refused; the lock died with its owner by kill -9")


def enters(path, entered):
    try:
        with RunFolder(path).locked():
            entered.put("in")
            signal.pause()  # until the test ends it
    except TrainingError:
        entered.put("refused")


def test_of_many_at_once_one_comes_in(tmp_path, full):
    context = get_context("fork")
    results = context.SimpleQueue()
    many = [context.Process(target=enters, args=(tmp_path / "run", results)) for _ in range(20 if full else 6)]
    for process in many:
        process.start()
    words = [results.get() for _ in many]
    for process in many:
        process.kill()
        process.join()
    assert words.count("in") == 1 and words.count("refused") == len(many) - 1
    with RunFolder(tmp_path / "run").locked():
        pass
