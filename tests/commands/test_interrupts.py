"""Ctrl-C, SIGTERM and SIGHUP outside of stages: the command that goes on is printed, and it works."""

import os
import pty
import shlex
import signal
import subprocess
import sys
import time

import forked
import pytest
from cli import REAL, cli
from tiny import tiny_recipe
from trained_runs import copy_of

from finetune.common.progress import console
from finetune.model.features import Features

STAGE = {"name": "align", "trains": ["projectors"], "learning_rate": 1.0e-2, "epochs": 2}


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path, train__stages=[STAGE])


def goes_on(done, number, folder):
    """Whether the printed command finishes the run."""
    assert done.returncode == 128 + number, done.stderr
    stopped, advice, printed = done.stderr.splitlines()[-3:]
    assert (stopped, advice) == ("stopped", "to go on:")
    program, *words = shlex.split(printed)
    assert program == "finetune" and words[-1] == "--resume"
    resumed = cli(*words, cwd=folder)
    return resumed.returncode == 0 and (folder / "runs" / "tiny" / "adapter").is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_while_media_are_encoded(number, recipe, tmp_path, monkeypatch):
    before, compute, calls = signal.getsignal(signal.SIGTERM), Features.compute, []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 4:
            signal.raise_signal(number)
        return compute(self, *arguments)

    monkeypatch.setattr(Features, "compute", interrupted)
    done = cli("train", recipe, "--set", "merge.rows=3", cwd=tmp_path)
    assert len(calls) == 4 and signal.getsignal(signal.SIGTERM) == before
    assert goes_on(done, number, tmp_path)


@pytest.mark.parametrize(
    ("number", "at"), [(signal.SIGTERM, "evaluation.evaluate.evaluate"), (signal.SIGHUP, "merging.merge.merge")]
)
def test_a_signal_while_a_run_is_evaluated_or_merged(number, at, recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(f"finetune.{at}", lambda run: signal.raise_signal(number))
        done = cli("run", recipe, cwd=tmp_path)
    monkeypatch.setattr("finetune.commands.run.answer_of", lambda *_: "")
    assert goes_on(done, number, tmp_path) and (tmp_path / "runs" / "tiny" / "certificate.json").is_file()


@pytest.mark.parametrize(("verb", "home"), [("evaluate", "evaluation"), ("merge", "merging")])
def test_a_signal_while_what_was_trained_is_scored_or_merged(verb, home, recipe, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "tiny"
    assert cli("train", recipe, cwd=tmp_path).returncode == 0
    with monkeypatch.context() as patched:
        patched.setattr(f"finetune.{home}.{verb}.Run.load", lambda *_: signal.raise_signal(signal.SIGINT))
        done = cli(verb, run, cwd=tmp_path)
    why, advice, printed = done.stderr.splitlines()[-3:]
    assert done.returncode == 130 and why.startswith("stopped; ") and advice == "to begin again:"
    program, *words = shlex.split(printed)
    assert program == "finetune" and not [*run.glob("*.partial")]
    assert cli(*words, cwd=tmp_path).returncode == 0


def test_a_closed_terminal_ends_an_evaluation_by_its_signal(finished_run, monkeypatch, tmp_path):
    """Nothing can be written there any more: neither by progress bars nor by the last message."""
    run = copy_of(finished_run("plain"), tmp_path)

    def slow(*arguments):
        print("answering", file=sys.stderr, flush=True)
        for _ in range(600):
            console.print("...")
            time.sleep(0.1)

    monkeypatch.setattr("finetune.evaluation.evaluate.Answers.ask_untrained", slow)
    child, terminal = pty.fork()
    if not child:  # a session of its own, with the terminal
        forked.become([*REAL, "evaluate", str(run)])
    output = b""
    while b"answering" not in output:
        output += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP


def test_before_there_is_a_run_nothing_can_be_gone_on_with(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.commands.check.check", lambda recipe: signal.raise_signal(signal.SIGTERM))
    done = cli("run", recipe, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (143, "stopped\n")


def test_a_signal_while_the_program_imports_is_answered_with_the_same_command(tmp_path):
    (tmp_path / "imported.py").write_text("import signal\nsignal.raise_signal(signal.SIGTERM)\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    code = """
from pathlib import Path
from finetune.commands._interrupts import how_to_go_on
from finetune.common.run_folder import RunFolder
with how_to_go_on("train", Path("x.yaml"), [], RunFolder(Path("run"))):
    import imported
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((os.getcwd(), str(tmp_path)))},
    )
    assert done.returncode == 143 and "stopped\nto go on:" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("train x.yaml --run run --resume")


def test_forked_workers_are_still_ended_by_sigterm():
    code = """
import multiprocessing, time
from pathlib import Path
from finetune.commands._interrupts import how_to_go_on
from finetune.common.run_folder import RunFolder
with how_to_go_on("train", Path("x.yaml"), [], RunFolder(Path("none"))):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    time.sleep(0.2)
    worker.terminate()
    worker.join()
    print(worker.exitcode)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("-15\n", "")
