"""Memory that runs out: batches are halved, with the same losses and weights; where one sample alone takes too much,
one message says what to change.
"""

import json
import os
import resource
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import forked
import pytest
import torch
from cli import REAL, cli
from packed import (
    SAMPLES,
    At,
    collator_of,
    composite_with_lora,
    composite_without_dropout,
    power_cut,
    read,
    samples_of,
    train_composite,
    weights_of,
)
from tiny import tiny_encoder, tiny_picture, tiny_recipe
from trained_runs import copy_of
from transformers import TrainerCallback

from finetune.common.errors import OutOfMemory
from finetune.common.run_folder import RunFolder
from finetune.merging.candidates import MergeJob
from finetune.model.assistant import Assistant
from finetune.model.features import Features
from finetune.model.row_layout import RowKind
from finetune.training.checkpoints import newest_whole

pytestmark = pytest.mark.slow
NAMED = [sample.__class__(**vars(sample) | {"where": f"rows.csv:{n + 2}"}) for n, sample in enumerate(SAMPLES)]
FIFTH = NAMED[5].input_ids
NAMED[5] = replace(  # the same picture and question as the first
    NAMED[5], input_ids=NAMED[0].input_ids[:7] + FIFTH[7:], media_keys=["0"], media_paths=["0"]
)
ROWS = [
    [[0], [1]],
    [[2], [3], [4]],
    [[5], [0], [1], [2]],
    [[3], [4]],
    [[0, 5], [1]],
    [[2], [3]],
    [[5], [4]],
    [[0], [2]],
]
ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "onednn": RuntimeError("could not create a primitive"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 12"),
    "python": MemoryError(),
}


class Room(TrainerCallback):
    """From step `step` on the LLM runs out of memory with more than `tokens`: going in, or on the way back."""

    def __init__(self, model, step, tokens, error=ERRORS["gpu"], backward=False):
        self.step, self.tokens, self.error, self.backward, self.now, self.seen = step, tokens, error, backward, 0, []
        model.causal_lm.model.register_forward_pre_hook(self.enter, with_kwargs=True)

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step + 1

    def enter(self, module, args, kwargs):
        tokens = kwargs["inputs_embeds"].shape[:2].numel()
        self.seen.append(tokens)
        if self.now >= self.step and tokens > self.tokens:
            if not self.backward:
                raise self.error
            kwargs["inputs_embeds"].register_hook(self.fail)

    def fail(self, gradient):
        raise self.error


def halved(run):
    return [json.loads(line) for line in (run.data / "micro_batches.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("step", "tokens", "accumulate", "kind", "error", "backward"),
    [
        (1, 22, 1, RowKind.PACKED, "gpu", False),
        (5, 24, 1, RowKind.SHARED, "cpu", True),
        (2, 33, 3, RowKind.PADDED, "python", True),
    ],
)
def test_rows_are_halved_and_the_losses_stay(step, tokens, accumulate, kind, error, backward, tmp_path, capsys):
    options = {"rows": ROWS, "accumulate": accumulate, "save_every_n_steps": 100}
    whole, model = composite_without_dropout(), composite_without_dropout()
    expected = train_composite(whole, tmp_path / "a" / "b" / "c", collator=collator_of(NAMED, kind=kind), **options)
    capsys.readouterr()
    run = RunFolder(tmp_path / "run")
    room = Room(model, step, tokens, ERRORS[error], backward)
    log = train_composite(
        model, run.checkpoints / "tune", callbacks=[room], collator=collator_of(NAMED, kind=kind), **options
    )
    for key in ("loss", "grad_norm"):
        assert [one[key] for one in log] == pytest.approx([one[key] for one in expected], rel=1e-5), key
    for name, weight in weights_of(whole).items():
        torch.testing.assert_close(weights_of(model)[name], weight, atol=1e-5, rtol=1e-5, msg=name)
    (first, *more) = halved(run)
    assert first["step"] == step and first["pieces"] == 2 and all(one["step"] >= step for one in more)
    said = " ".join(capsys.readouterr().err.split())
    assert f"tune: out of memory at step {step}: from here on each packed row is computed in 2 pieces" in said
    assert f"train.accumulate: {2 * accumulate}" in said and "train.tokens_per_batch: 1024" in said
    assert said.count("out of memory") == len([first, *more])


def test_a_resumed_run_halves_at_the_same_place(tmp_path):
    """With dropout: to the weights and losses of the run that wasn't interrupted."""
    options = {"rows": ROWS, "collator": collator_of(NAMED), "save_every_n_steps": 2}
    whole, run = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "run")
    model, cut, resumed = (composite_with_lora() for _ in range(3))
    log = train_composite(model, whole.checkpoints / "tune", callbacks=[Room(model, 3, 40, backward=True)], **options)
    assert [one["step"] for one in halved(whole)] == [3]
    with pytest.raises(OSError):
        train_composite(cut, run.checkpoints / "tune", callbacks=[Room(cut, 3, 40), At(4, power_cut)], **options)
    assert newest_whole(run, "tune").name == "checkpoint-2"  # the place is known, though the checkpoint is older
    room = Room(resumed, 3, 40)
    again = train_composite(
        resumed, run.checkpoints / "tune", callbacks=[room], resume_from=newest_whole(run, "tune"), **options
    )
    assert halved(run) == halved(whole) and max(room.seen) <= 40  # not tried again
    assert [one["loss"] for one in again] == [one["loss"] for one in log]
    for name, weight in weights_of(model).items():
        assert torch.equal(weights_of(resumed)[name], weight), name


@pytest.mark.parametrize("error", ["gpu", pytest.param("cpu", marks=pytest.mark.full)])
def test_where_one_sample_is_too_much_the_message_says_what_to_change(error, tmp_path):
    run, model = RunFolder(tmp_path), composite_with_lora()
    with pytest.raises(OutOfMemory) as stopped:
        train_composite(
            model,
            run.checkpoints / "tune",
            rows=ROWS,
            callbacks=[Room(model, 2, 14, ERRORS[error])],
            collator=collator_of(NAMED),
            save_every_n_steps=100,
        )
    message = str(stopped.value)
    assert stopped.value.exit_status == 1
    assert "tune: out of memory at step 2; rows.csv:4 takes more than there is, alone" in message
    assert "train.checkpoint_every_n_layers: 1" in message and "finetune plan RECIPE" in message
    assert newest_whole(run, "tune").name == "checkpoint-1"  # nothing is lost


def test_what_compares_whole_rows_is_not_halved(tmp_path):
    model = composite_with_lora()
    with pytest.raises(OutOfMemory, match="the loss of kto is one of whole packed rows"):
        train_composite(
            model,
            tmp_path / "checkpoints" / "tune",
            rows=ROWS,
            callbacks=[Room(model, 1, 20)],
            collator=collator_of([replace(one, role="desirable", group=f"{n}") for n, one in enumerate(NAMED)]),
            objective="kto",
        )


def test_rows_with_an_auxiliary_loss_are_not_halved(tmp_path):
    model = composite_with_lora("mixtral", dropout=0.0)
    stopped = r"the auxiliary loss of the routers of MixtralForCausalLM is one of whole packed rows, which can't be"
    with pytest.raises(OutOfMemory, match=stopped):
        train_composite(
            model,
            tmp_path / "checkpoints" / "tune",
            rows=ROWS,
            callbacks=[Room(model, 1, 20)],
            collator=collator_of(NAMED),
        )


@pytest.mark.full
def test_bad_rows_are_left_out_of_halved_ones(tmp_path):
    """The same rows, losses and weights as where memory does."""

    def spoiled(medium):
        return read(medium) * (float("nan") if medium.key == "3" else 1.0)

    options = {"rows": ROWS[:4], "collator": collator_of(NAMED, read=spoiled), "accumulate": 2}
    options |= {"settings": {"skip_bad_rows": True}, "save_every_n_steps": 100}
    whole, model = composite_without_dropout(), composite_without_dropout()
    expected = train_composite(whole, tmp_path / "whole" / "checkpoints" / "tune", **options)
    log = train_composite(model, tmp_path / "run" / "checkpoints" / "tune", callbacks=[Room(model, 1, 24)], **options)
    assert [one["loss"] for one in log] == pytest.approx([one["loss"] for one in expected], rel=1e-5)
    for name, weight in weights_of(whole).items():
        torch.testing.assert_close(weights_of(model)[name], weight, atol=1e-5, rtol=1e-5, msg=name)
    left_out = [(tmp_path / run / "data" / "suspects.jsonl").read_text() for run in ("whole", "run")]
    assert left_out[0] == left_out[1] and "rows.csv:5" in left_out[0]


def test_encoding_halves_its_batch(capsys):
    encoder = tiny_encoder()
    prepared = [encoder.prepare(tiny_picture((40 * n, 10, 10))) for n in range(7)]
    expected = Features({"image": encoder}, None).compute("image", prepared)
    features = Features({"image": encoder}, None)
    real, sizes = encoder.encode, []

    def encode(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise ERRORS["cpu"]
        return real(batch)

    encoder.encode = encode
    capsys.readouterr()
    for one, other in zip(features.compute("image", prepared, 7), expected, strict=True):
        torch.testing.assert_close(one, other)
    features.compute("image", prepared, 7)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1, *[1] * 7]
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "out of memory encoding image: 1 at once from here on, not 3. For the next run write train.encode_batch: 1"
        in said
    )


def test_scores_stay_where_answers_are_halved_and_a_merge_says_what_it_needs(finished_run, tmp_path, monkeypatch):
    run = copy_of(finished_run("plain"), tmp_path)
    expected = (run / "predictions.jsonl").read_text()
    merged = {path: path.stat().st_mtime_ns for path in (run / "merged").rglob("*")}
    sizes, real = [], Assistant.ask

    def ask(self, name, conversations, **options):
        sizes.append(len(conversations))
        if len(conversations) > 2:
            raise ERRORS["gpu"]
        return real(self, name, conversations, **options)

    monkeypatch.setattr(Assistant, "ask", ask)
    evaluated = cli("evaluate", run)
    assert evaluated.returncode == 0 and sizes[:2] == [4, 2] and sizes.count(4) == 1
    assert (run / "predictions.jsonl").read_text() == expected
    assert "2 at once from here on, not 4. For the next run write evaluate.batch: 2" in " ".join(
        evaluated.stderr.split()
    )
    monkeypatch.setattr(Assistant, "ask", lambda *arguments, **options: raises(ERRORS["gpu"]))
    alone = cli("evaluate", run)
    assert alone.returncode == 1 and alone.stderr.splitlines()[-1].startswith("out of memory answering, for one alone.")
    monkeypatch.setattr(Assistant, "ask", real)
    monkeypatch.setattr(MergeJob, "write", lambda *arguments: raises(ERRORS["cpu"]))
    refused = cli("merge", run)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("out of memory merging. To need less, close other programs")
    assert {path: path.stat().st_mtime_ns for path in (run / "merged").rglob("*")} == merged


def raises(error):
    raise error


def virtual(key):
    """VmSize or VmPeak of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def trains_in(folder, rows, accumulate, room, results):
    """A stage of long rows; puts (losses, lines of micro_batches.jsonl, bytes that it took)."""
    samples = [replace(one, where=f"rows.csv:{number + 2}") for number, one in enumerate(samples_of([200] * 16))]
    model, before = composite_without_dropout(), virtual("VmSize")
    if room:
        resource.setrlimit(resource.RLIMIT_AS, (before + room, resource.RLIM_INFINITY))
    log = train_composite(
        model,
        folder / "run" / "checkpoints" / "tune",
        rows=rows,
        accumulate=accumulate,
        collator=collator_of(samples),
        save_every_n_steps=100,
    )
    known = halved(RunFolder(folder / "run")) if room else []
    results.put(([entry["loss"] for entry in log], known, virtual("VmPeak") - before))


@pytest.mark.full
@pytest.mark.parametrize("short", [0, 6])
def test_under_a_limit_of_the_system(short, tmp_path, tried):
    """Rows of 3,200 tokens, whose mask alone grows by the square; `short` steps of few tokens come first."""
    few, many = [[[0], [1]]] * short, [[number] for number in range(16)]
    context = get_context("fork")

    def trained(name, rows, accumulate=1, room=0):
        results = context.SimpleQueue()
        process = context.Process(target=trains_in, args=(tmp_path / name, rows, accumulate, room, results))
        process.start()
        found = results.get()
        process.join()
        return found

    losses, _, whole = trained("whole", [*few, *[many] * 3])
    pieces = [*[[row[:1], row[1:]] for row in few], *[[many[:8], many[8:]]] * 3]
    _, _, least = trained("pieces", [part for both in pieces for part in both], 2)
    assert least < 0.7 * whole
    limited, known, _ = trained("limited", [*few, *[many] * 3], room=(whole + least) // 2)
    assert known and known[0]["step"] == short + 1 and limited == pytest.approx(losses, rel=1e-5)
    tried(
        f"out of memory at step {short + 1}: {(whole + least) // 2**21} MiB where a row takes {whole // 2**20}",
        f"computed in {known[-1]['pieces']} pieces; losses within 1e-5",
    )


@pytest.mark.full
@pytest.mark.parametrize("verb", ["train", "evaluate", "merge"])
def test_with_little_memory_a_command_ends_or_says_so(verb, tmp_path, tried):
    recipe, statuses = tiny_recipe(tmp_path), []
    assert verb == "train" or cli("train", recipe, "--run", tmp_path / "run").returncode == 0
    arguments = (
        [str(recipe), "--run", str(tmp_path / "run"), "--overwrite"] if verb == "train" else [str(tmp_path / "run")]
    )
    for room in (8, 16, 32, 64, 128, 256, 512, 1024):  # with less the interpreter itself fails
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            os.dup2(write_end, 2)
            resource.setrlimit(resource.RLIMIT_AS, (virtual("VmSize") + room * 2**20, resource.RLIM_INFINITY))
            forked.become([*REAL, verb, *arguments])
        os.close(write_end)
        with os.fdopen(read_end, errors="replace") as file:
            said = file.read()
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        assert "Traceback" not in said, (room, said)
        assert statuses[-1] == 0 or (statuses[-1] == 1 and "memory" in said.splitlines()[-1]), (room, said)
    tried(f"{verb} in 8 to 1024 MiB more than it began with", f"exit {sorted({*statuses})}; no traceback")
