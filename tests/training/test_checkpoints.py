"""Checkpoints that can be trusted: damage is seen, named, and gone around."""

import re
import signal
from itertools import count
from pathlib import Path

import pytest
import torch
from cli import cli
from packed import At, composite_with_lora, power_cut, train_composite, weights_of
from tiny import tiny_recipe
from trained_runs import copy_of

import finetune
from finetune.common.errors import Interrupted, TrainingError
from finetune.common.run_folder import RunFolder, write_hashes, write_json
from finetune.recipe.schema import Validation
from finetune.training.checkpoints import newest_whole
from finetune.training.stopping import StopBetweenSteps
from finetune.training.validation import ValidationCallback

pytestmark = pytest.mark.slow

FILES = [
    *("adapter_config.json", "adapter_model.safetensors", "projectors.safetensors", "optimizer.pt", "scheduler.pt"),
    *("rng_state.pth", "trainer_state.json", "seconds.json", "sha256.json"),
]


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A run without power after step 5 of 6, with checkpoints of steps 2 and 4."""
    run = RunFolder(tmp_path_factory.mktemp("cut"))
    with pytest.raises(OSError, match="power cut"):
        train_composite(composite_with_lora(), run.checkpoints / "tune", callbacks=[At(6, power_cut)])
    return run


def copied(run: RunFolder, to: Path) -> RunFolder:
    return RunFolder(copy_of(run.path, to))


def test_the_last_two_checkpoints_are_kept_with_all_their_files(tmp_path):
    run = RunFolder(tmp_path)
    train_composite(composite_with_lora(), run.checkpoints / "tune")
    assert [path.name for path in run.checkpoints_of("tune")] == ["checkpoint-6", "checkpoint-4"]
    assert {path.name for path in (run.checkpoints / "tune").iterdir()} == {"checkpoint-4", "checkpoint-6"}
    for path in run.checkpoints_of("tune"):
        assert {file.name for file in path.iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_seen_and_the_checkpoint_before_is_taken(name, cut, tmp_path, capsys):
    run = copied(cut, tmp_path)
    assert newest_whole(run, "tune").name == "checkpoint-4"
    assert not capsys.readouterr().err
    flip(run.checkpoints / "tune" / "checkpoint-4" / name)
    assert newest_whole(run, "tune").name == "checkpoint-2"
    message = "".join(capsys.readouterr().err.split())
    assert "checkpoint-4isdamaged" in message
    assert name in message or name == "sha256.json"  # a damaged manifest: named is the file that differs


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_not_copied_is_seen(name, cut, tmp_path, capsys):
    run = copied(cut, tmp_path)
    (run.checkpoints / "tune" / "checkpoint-4" / name).unlink()
    assert newest_whole(run, "tune").name == "checkpoint-2"
    assert f"{name}ismissing" in "".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("left", [0, 100])
@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".pt", ".pth"))])
def test_a_file_that_is_cut_off_is_seen(name, left, cut, tmp_path, capsys):
    run = copied(cut, tmp_path)
    file = run.checkpoints / "tune" / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[:left])
    assert newest_whole(run, "tune").name == "checkpoint-2"
    assert name in "".join(capsys.readouterr().err.split())


def test_without_a_whole_checkpoint_the_run_says_how_to_begin_anew(cut, tmp_path):
    run = copied(cut, tmp_path)
    for step in (2, 4):
        flip(run.checkpoints / "tune" / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(TrainingError, match=r"no whole checkpoint is left.*overwrite=True"):
        newest_whole(run, "tune")
    assert newest_whole(run, "another") is None


def test_a_run_that_goes_on_from_the_checkpoint_before_ends_on_the_same_weights(cut, tmp_path):
    run = copied(cut, tmp_path)
    flip(run.checkpoints / "tune" / "checkpoint-4" / "adapter_model.safetensors")
    whole, resumed = composite_with_lora(), composite_with_lora()
    log = train_composite(whole, tmp_path / "whole")
    rest = train_composite(resumed, run.checkpoints / "tune", resume_from=newest_whole(run, "tune"))
    assert [entry["loss"] for entry in rest] == pytest.approx([entry["loss"] for entry in log])
    assert [entry["num_tokens"] for entry in rest] == [entry["num_tokens"] for entry in log]
    for name, weight in weights_of(whole).items():
        torch.testing.assert_close(weights_of(resumed)[name], weight, atol=1e-7, rtol=0, msg=name)
    assert newest_whole(run, "tune").name == "checkpoint-6"


def test_a_resumed_training_counts_its_own_tokens_a_second(cut, tmp_path, monkeypatch):
    """By a clock on which a step takes a second."""
    run, seconds = copied(cut, tmp_path), count()
    monkeypatch.setattr("finetune.training.trainer.perf_counter", lambda: float(next(seconds)))
    whole = train_composite(composite_with_lora(), tmp_path / "whole")
    rest = train_composite(composite_with_lora(), run.checkpoints / "tune", resume_from=newest_whole(run, "tune"))[4:]
    for log, begun in ((whole, 0), (rest, whole[3]["num_tokens"])):
        first, *others = log
        assert first["num_tokens"] > begun and "tokens_per_second" not in first
        for number, entry in enumerate(others, 1):
            assert entry["tokens_per_second"] == (entry["num_tokens"] - first["num_tokens"]) / number
    assert len(rest) == 2


def test_a_resumed_run_says_after_which_step_it_goes_on(tmp_path, capsys):
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(Interrupted), pytest.MonkeyPatch.context() as patched:
        patched.setattr(StopBetweenSteps, "on_step_end", stop_after(3))
        finetune.train(recipe, tmp_path / "run")
    capsys.readouterr()
    finetune.train(recipe, tmp_path / "run", resume=True)
    printed = capsys.readouterr().err
    assert re.search(r"^tune: goes on after step 3 of \d+$", printed, re.M) and "align: done before\n" in printed


def stop_after(step):
    """In place of a signal, in the stage `tune`."""
    real = StopBetweenSteps.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step and "tune" in Path(args.output_dir).parts:
            signal.raise_signal(signal.SIGTERM)
        real(self, args, state, control, **kwargs)

    return on_step_end


def test_a_damaged_checkpoint_gives_way_to_a_whole_one_of_an_earlier_step(cut, tmp_path):
    run = copied(cut, tmp_path)
    flip(run.checkpoints / "tune" / "checkpoint-4" / "scheduler.pt")
    with pytest.raises(Interrupted):
        train_composite(
            composite_with_lora(),
            run.checkpoints / "tune",
            resume_from=newest_whole(run, "tune"),
            callbacks=[At(3, lambda: signal.raise_signal(signal.SIGINT))],
        )
    assert [path.name for path in run.checkpoints_of("tune")] == ["checkpoint-3", "checkpoint-2"]


def test_the_weights_of_a_finished_stage_are_checked_too(finished_run, tmp_path):
    plain = finished_run("plain")
    run = copy_of(plain, tmp_path, "merged")
    flip(run / "checkpoints" / "align" / "final" / "projectors.safetensors")
    with pytest.raises(TrainingError, match="align: no whole checkpoint is left"):
        finetune.train(finetune.load_recipe(plain.parent / "recipe.yaml"), run, resume=True)


def test_the_best_weights_of_a_stage_are_checked_before_it_goes_on(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "projectors.safetensors").write_bytes(bytes(100))
    write_hashes(tmp_path / "best")
    write_json(tmp_path / "validation.json", {"passes": [{"step": 2, "score": 0.5}]})
    callback = ValidationCallback(None, tmp_path, Validation(), evaluate=dict, select=lambda scores: 0.0)
    callback.resume(2)
    assert callback.best.step == 2
    flip(tmp_path / "best" / "projectors.safetensors")
    callback.resume(1)  # without a pass so far there is nothing to end on
    with pytest.raises(TrainingError, match=r"best/projectors\.safetensors isn't as it was written"):
        callback.resume(2)


def test_weights_of_a_pass_that_comes_out_otherwise_are_not_those_of_the_best(tmp_path):
    """Killed behind a pass, a stage goes on from before it at a lower rate: the pass is worse this time."""
    model, scores = composite_with_lora(), iter([0.3, 0.5, 0.9, 0.4, 0.2])

    def callback():
        answered = ({}, [], [])
        return ValidationCallback(
            model, tmp_path, Validation(), evaluate=lambda: answered, select=lambda _: next(scores)
        )

    def passes(validation, *steps):
        for step in steps:
            with torch.no_grad():
                model.projectors["image"].get_parameter(name).fill_(step)
            validation.validate(step, control=None)

    name = next(name for name, _ in model.projectors["image"].named_parameters())
    passes(callback(), 0, 2, 4)  # 0.9: the weights of step 4 take the place of those of step 2
    resumed = callback()
    resumed.resume(3)
    passes(resumed, 4, 6)
    assert [one.score for one in resumed.history] == [0.3, 0.5, 0.4, 0.2]
    again = callback()
    again.resume(6)
    assert resumed.restore_best() == again.restore_best() == 4
    assert model.projectors["image"].get_parameter(name).unique().tolist() == [4.0]


def test_a_finished_run_is_overwritten(finished_run, tmp_path):
    """It holds all that a run can hold."""
    plain = finished_run("plain")
    run = copy_of(plain, tmp_path)
    finetune.report(run)
    stage = "train.stages=[{name: only, trains: [projectors, adapter], learning_rate: 1.0e-3}]"
    arguments = ("train", plain.parent / "recipe.yaml", "--set", stage, "--run", run)
    refused = cli(*arguments)
    assert refused.returncode == 1
    assert all(f"--{option} " in refused.stderr for option in ("resume", "overwrite", "run"))
    done = cli(*arguments, "--overwrite")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in run.iterdir()}
    assert names == {"recipe.yaml", "versions.json", "data", "checkpoints", "adapter", "metrics.json", "plots"}
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["only"]
