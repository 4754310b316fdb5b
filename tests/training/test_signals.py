"""Training that receives SIGINT, SIGTERM or SIGHUP saves a checkpoint and ends."""

import os
import pty
import shlex
import signal
import subprocess
import threading
from pathlib import Path
from unittest.mock import Mock

import forked
import pytest
import torch
from cli import REAL, cli
from packed import At, composite_with_lora, train_composite
from safetensors.torch import load_file
from tiny import tiny_recipe

import finetune
from finetune.common.errors import ArtifactError, Interrupted
from finetune.common.run_folder import damage
from finetune.common.signals import SIGNALS
from finetune.training.stopping import StopBetweenSteps
from finetune.training.trainer import StageTrainer

STAGE = {"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 5.0e-3, "epochs": 30}


def sent(step, *numbers):
    """Signals to this process while step `step` (from 1) is made."""
    return At(step, lambda: [signal.raise_signal(number) for number in numbers])


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_saves_after_the_step(number, tmp_path, capfd):
    handlers = [signal.getsignal(each) for each in SIGNALS]
    folder = tmp_path / "checkpoints" / "tune"
    with pytest.raises(Interrupted, match="stopped after step 3 of 6") as stopped:
        train_composite(composite_with_lora(), folder, callbacks=[sent(3, number)], save_every_n_steps=100)
    assert stopped.value.exit_status == 128 + number
    assert [path.name for path in folder.iterdir()] == ["checkpoint-3"] and damage(folder / "checkpoint-3") is None
    assert "finishing this step and saving a checkpoint" in capfd.readouterr().err
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


def test_an_interrupted_run_says_what_goes_on_with_it(tmp_path, monkeypatch):
    recipe, run = tiny_recipe(tmp_path, train__stages=[STAGE | {"epochs": 1}]), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageTrainer, "training_step", Mock(side_effect=KeyboardInterrupt))
        finetune.train(recipe, run)
    for ask in (finetune.evaluate, finetune.merge, finetune.load):
        with pytest.raises(ArtifactError, match="its training hasn't finished; ") as caught:
            ask(run)
    command = str(caught.value).partition("; ")[2].removesuffix(" goes on with it")
    assert eval(command, {"finetune": finetune}).adapter.is_dir()


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_ctrl_c_after_a_signal_ends_at_once(numbers, tmp_path):
    handlers = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(KeyboardInterrupt):
        train_composite(composite_with_lora(), tmp_path, callbacks=[sent(3, *numbers)], save_every_n_steps=100)
    assert not list(tmp_path.glob("checkpoint-*"))
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


def test_a_signal_that_comes_again_changes_nothing(tmp_path, capfd):
    """A closed terminal sends SIGHUP twice: by the kernel and by the shell."""
    with pytest.raises(Interrupted) as stopped:
        train_composite(composite_with_lora(), tmp_path, callbacks=[sent(3, signal.SIGHUP, signal.SIGHUP)])
    assert stopped.value.exit_status == 129
    assert capfd.readouterr().err.count("SIGHUP") == 1


def test_what_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopBetweenSteps() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert not stop.signal_number and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_no_handler_is_set(tmp_path):
    handlers = [signal.getsignal(each) for each in SIGNALS]
    seen = []

    def work():
        with StopBetweenSteps():
            seen.extend(signal.getsignal(each) for each in SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == handlers


def recipe_of(folder: Path) -> Path:
    """90 steps: time for a signal on the way."""
    return tiny_recipe(folder, train__stages=[STAGE], adapter={"rank": 2, "dropout": 0.1})


@pytest.mark.slow
def test_a_run_ended_by_sigterm_goes_on_with_the_printed_command(tmp_path):
    """To the weights of a run that nothing has ended, and with its losses."""
    recipe = recipe_of(tmp_path)
    command = [*REAL, "train", str(recipe), "--set", "publish.limits=for a test, 'only'"]
    process = forked.popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "tune: step 18/90" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM, rest
    *_, advice, printed = rest.strip().splitlines()
    assert advice == "to go on:" and "Traceback" not in rest
    words = shlex.split(printed)
    assert tuple(words[:3]) == REAL and words[-3:] == ["--run", "runs/tiny", "--resume"]
    resumed = cli(*words[3:], cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    whole = cli(*command[3:], "--run", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    for name in ("adapter_model.safetensors", "projectors.safetensors"):
        left, right = (load_file(tmp_path / run / "adapter" / name) for run in ("runs/tiny", "whole"))
        assert left.keys() == right.keys()
        for key in left:
            torch.testing.assert_close(left[key], right[key], atol=1e-6, rtol=0)
    assert "goes on after step" not in whole.stderr


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves(tmp_path):
    recipe = recipe_of(tmp_path)
    child, terminal = pty.fork()
    if not child:  # a session of its own, with the terminal
        os.chdir(tmp_path)
        forked.become([*REAL, "train", str(recipe)])
    output = b""
    while b"/90" not in output or b"loss" not in output:
        output += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP
    (checkpoint,) = (tmp_path / "runs" / "tiny" / "checkpoints" / "tune").iterdir()
    assert damage(checkpoint) is None
