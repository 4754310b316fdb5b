"""The checks for a GPU, each at toy size on a CPU, and what runs them."""

import io
import json
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from varlen import use_kernel

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.gpu.__main__ import chosen, in_this_process, main, perform
from benchmarks.gpu.checks import Skipped
from benchmarks.gpu.report import Timed, compared, judged, report
from benchmarks.gpu.run import Outcome, run_all
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import STEPS, Step
from finetune.common.progress import console

CHILD = """
import json, os, sys, time
for line in sys.stdin:
    name = line.strip()
    if name == "dies":
        os.kill(os.getpid(), 9)
    if name == "hangs":
        time.sleep(60)
    result = "fail" if name == "fails" else "pass"
    outcome = {"name": name, "result": result, "detail": str(os.getpid()), "seconds": 0.0}
    with open(f"{sys.argv[2]}/{name}.unfinished", "w") as file:
        json.dump(outcome, file)
    os.rename(f"{sys.argv[2]}/{name}.unfinished", f"{sys.argv[2]}/{name}.outcome.json")
"""


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("gpu"), "cpu", toy=True)


@pytest.fixture(autouse=True)
def loud_again(monkeypatch):
    """The console of this process, which some checks silence."""
    monkeypatch.setattr(console, "quiet", False)


def detail(setting, name):
    step = next(step for step in STEPS if step.name == name)
    outcome = perform(step, setting, import_module(f"benchmarks.gpu.checks.{step.file}"))
    assert outcome.result == "pass", outcome.detail
    return outcome.detail


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, expected",
    [
        ("machine", "torch"),
        ("attention", "a segment a call"),
        ("rows", "gemma3_text float16"),
        ("nf4", "bfloat16"),
        ("float16", "at most 0.0%"),
        ("answers", "HTTP equal"),
        ("merge", "beside the full GPU agreement 1.000"),
    ],
)
def test_a_check_at_toy_size(name, expected, setting):
    assert expected in detail(setting, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "rows"])
def test_a_check_with_the_kernel_of_a_gpu(name, setting, monkeypatch):
    calls = use_kernel(monkeypatch)
    assert ("one kernel" if name == "attention" else "gemma3_text float16") in detail(setting, name)
    assert {query.dtype for query, *_ in calls} == {torch.bfloat16, torch.float16}


def test_a_gpu_is_filled_but_for_what_is_left(monkeypatch):
    merge = import_module("benchmarks.gpu.checks.merge")
    taken = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 4000))
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: taken.append((size, dtype, device)))
    with merge.filled(300.0):
        assert taken == [(700, torch.uint8, "cuda")]


@pytest.mark.slow
def test_training_beside_trl_at_toy_size(setting):
    assert "16 tokens of a picture" in detail(setting, "weights")
    llm = setting.folder / "llm"
    assert json.loads((llm / "config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert "of 970 tokens ours reads 666" in detail(setting, "k=5 prepare")
    assert "ours reads" in detail(setting, "k=1 prepare")
    losses: dict[tuple[int, str], list[float]] = {}
    for step in STEPS:
        if step.timed:
            assert "samples/s" in detail(setting, step.name)
            questions, kind = step.timed
            found = json.loads((setting.folder / f"questions-{questions}" / f"{kind}.json").read_text())["losses"]
            side = (questions, kind.partition("-")[0])
            # Over the same weights, which no run before has changed.
            assert losses.setdefault(side, found) == pytest.approx(found, rel=1e-5)
    text = report(setting, [Outcome("machine", "pass", "A card; torch"), Outcome("k=5 ours-compiled", "pass", "")])
    assert "## On a GPU: A card, " in text and "| 5 | ours-compiled | " in text


def test_what_dies_or_hangs_leaves_the_others(tmp_path, capsys):
    steps = [
        Step("dies", "", 50, needs=()),
        Step("needs it", "", 50, needs=("dies",)),
        Step("lives", "", 50, needs=()),
        Step("too long", "", 1000, needs=()),
        Step("hangs", "", 0, needs=()),
    ]
    outcomes = list(run_all(Setting(tmp_path, "cuda", toy=True), steps, 300, [sys.executable, "-c", CHILD]))
    assert [(one.name, one.result) for one in outcomes] == [
        ("dies", "fail"),
        ("needs it", "skip"),
        ("lives", "pass"),
        ("too long", "skip"),
        ("hangs", "fail"),
    ]
    assert "ended with -9" in outcomes[0].detail and "took too long" in outcomes[4].detail


def test_steps_of_a_process_share_it_until_one_fails(tmp_path, capsys):
    names = {"first": "a", "second": "a", "fails": "a", "third": "a", "fourth": "b", "fifth": "b", "sixth": "a"}
    steps = [Step(name, "", 50, needs=(), process=process) for name, process in names.items()]
    outcomes = list(run_all(Setting(tmp_path, "cpu", toy=True), steps, 300, [sys.executable, "-c", CHILD]))
    assert [one.result == "pass" for one in outcomes] == [name != "fails" for name in names]
    first, second, fails, third, fourth, fifth, sixth = (one.detail for one in outcomes)
    assert first == second == fails and fourth == fifth
    assert len({first, third, fourth, sixth}) == 4


@pytest.mark.parametrize(
    ("kind", "there", "reason"),
    [
        ("ours-liger", ["triton", "cc"], "liger-kernel isn't installed"),
        ("peer-plain", ["triton", "cc"], "liger-kernel isn't installed"),
        ("peer-plain", ["liger_kernel"], None),
        ("ours-compiled", ["gcc"], "compiling needs triton$"),
        ("peer-compiled", ["triton"], "compiling needs a C compiler"),
        ("peer-compiled", [], "compiling needs triton and a C compiler"),
        ("peer-compiled", ["triton", "clang"], None),
        ("ours", [], None),
    ],
)
def test_what_a_gpu_machine_lacks_is_named(kind, there, reason, monkeypatch):
    training = import_module("benchmarks.gpu.checks.training")
    monkeypatch.setattr(training, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr(training.shutil, "which", lambda name: name if name in there else None)
    with pytest.raises(Skipped, match=reason) if reason else nullcontext():
        training.refuse_missing(kind, "cuda")
    training.refuse_missing(kind, "cpu")


def test_a_check_that_fails_tells_why(setting, capsys):
    class Check:
        @staticmethod
        def check(setting):
            raise AssertionError("errors of\n gradients 0.3")

    assert perform(STEPS[0], setting, Check) == Outcome("machine", "fail", "AssertionError: errors of gradients 0.3")
    assert perform(STEPS[0], setting, ImportError("no such")).detail == "ImportError: no such"


def test_a_check_that_cannot_be_tried_or_imported_is_an_outcome(setting, monkeypatch, capsys):
    def check(setting):
        raise Skipped("no card")

    assert perform(STEPS[0], setting, SimpleNamespace(check=check)) == Outcome("machine", "skip", "no card")
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.checks.machine", None)
    (setting.folder / "setting.json").unlink(missing_ok=True)
    setting.save()
    monkeypatch.setattr(sys, "stdin", io.StringIO("machine\n"))
    assert in_this_process("machine", setting.folder) == 0
    found = json.loads((setting.folder / "machine.outcome.json").read_text())
    assert found["result"] == "fail" and "ModuleNotFoundError" in found["detail"]


def test_what_a_chosen_check_needs_comes_along():
    assert [step.name for step in chosen(["k=1 trl-compiled"])] == [
        "machine",
        "weights",
        "k=1 prepare",
        "k=1 trl-compiled",
    ]
    with pytest.raises(SystemExit, match="no check is called 'speed'"):
        chosen(["speed"])


def test_all_fits_into_eight_minutes():
    assert sum(step.seconds for step in STEPS) < 480


def test_ratios_and_goals():
    gib = 2**30
    runs = [Timed(1, "ours", 8.0, 0.5, 30 * gib, 24 * gib), Timed(1, "peer", 4.0, 0.75, 40 * gib, 30 * gib)]
    assert compared(runs)[-1] == "| 1 | trl | 4.00 | 750.0 | 40.00 | 30.00 | 2.00 | 1.50 | 0.75 | 0.80 |"
    assert "not reached (2.00 times, 1.50 in steps, 75% of the peak)" in judged(1, runs)
    assert "goal 4 times trl: not measured" in judged(5, runs)


def test_the_command_prints_a_line_a_check_and_its_report(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--toy", "--only", "rows", "--append"])
    monkeypatch.setattr("benchmarks.gpu.report.RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr("benchmarks.gpu.__main__.run_all", lambda setting, steps, seconds: map(failed, steps))
    assert main() == 1
    printed = capsys.readouterr().out
    assert printed.startswith("fail  machine") and "| rows | fail | 0.0 | not \\| so |" in printed
    assert (tmp_path / "RESULTS.md").read_text() in printed


def failed(step):
    return Outcome(step.name, "fail", "not | so")


def test_a_process_waits_for_its_turn(tmp_path, monkeypatch):
    Setting(tmp_path, "cpu", toy=True).save()
    for line, exists in (("", False), ("machine\n", True)):  # the command has ended; its turn has come
        monkeypatch.setattr(sys, "stdin", io.StringIO(line))
        assert in_this_process("machine", tmp_path) == 0
        assert (tmp_path / "machine.outcome.json").is_file() == exists
