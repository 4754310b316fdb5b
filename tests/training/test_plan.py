"""What a plan says is what a step takes, and what a user sees of it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import soundfile
import torch
from cli import cli
from tiny import tiny_llm_folder, tiny_recipe, tiny_vision_folder
from tiny_encoders import tiny_audio_folder, tiny_sound
from transformers import AutoModelForCausalLM

from finetune.common.errors import ModelError, RecipeError
from finetune.common.gpu import GIB
from finetune.evaluation.report.tables import planned_beside
from finetune.evaluation.results import Metrics
from finetune.model.row_layout import RowKind
from finetune.recipe.load import Recipe, load_recipe
from finetune.training.plan.apart import planning, without_auto
from finetune.training.plan.cards import CARDS, card_like
from finetune.training.plan.measure import Measured, measure
from finetune.training.plan.meter import AutocastOnGpu, Meter, Rehearsal, with_data
from finetune.training.plan.plan import largest_tokens_per_batch, own_card, plan
from finetune.training.plan.result import TIGHT
from finetune.training.plan.rows import PlannedRows, PlannedRun
from finetune.training.train import train

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import plan_accuracy


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["tiny, second stage", "cross-attention", "checkpoints", "base in nf4, projectors"])
def test_planned_and_real_bytes_agree_part_by_part(pair):
    for part, (planned, real) in plan_accuracy.compare(pair)["parts"].items():
        assert planned == pytest.approx(real, rel=0.01), part


TUNE = [{"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 1.0e-3}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


def recipe_in(folder: Path, **changes: Any) -> Recipe:
    return load_recipe(tiny_recipe(folder, train__stages=TUNE, **changes))


@pytest.fixture(scope="module")
def usual(folder):
    """On a T4, so in float16."""
    return plan(recipe_in(folder), "t4", advise=False)


def test_parts_are_those_of_a_closed_form(folder, usual):
    """LoRA of rank 4 in float32, and Adam with two numbers a weight; an LLM in 16 bits."""
    tune = next(phase for phase in usual.phases if phase.name == "train tune")
    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    adapter = 2 * sum(4 * (inside + outside) for inside, outside in shapes)
    projector = tune.parts["projectors.image"] // 4
    assert tune.parts["adapter"] == 4 * adapter
    assert tune.parts["gradients"] == 4 * (adapter + projector)
    # Each of Adam's tensors has a count of its steps beside it.
    assert 0 <= tune.parts["optimizer"] - 8 * (adapter + projector) < 1000
    llm = AutoModelForCausalLM.from_pretrained(folder / "llm")
    weights = 2 * sum(p.numel() for p in llm.parameters())
    assert weights <= tune.parts["language_model"] < weights + 1000  # and the frequencies of its positions


def test_no_weights_are_read(folder, usual):
    """Only configs and tokenizers are there."""
    hidden = [(file, file.with_suffix(".hidden")) for file in folder.rglob("model.safetensors")]
    assert len(hidden) == 2
    for file, aside in hidden:
        file.rename(aside)
    try:
        assert plan(recipe_in(folder), "t4", advise=False) == usual
    finally:
        for file, aside in hidden:
            aside.rename(file)


def test_every_source_is_among_the_rows_that_are_read(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "data" / "one.csv").write_text("image,label\nimages/train0.png,scarlet\n")
    content = json.loads(recipe.read_text())
    content["data"].insert(0, {"path": str(tmp_path / "data" / "one.csv"), "task": "classify"})
    content["data"][1]["path"] = str(tmp_path / "data" / "train.csv")
    content["train"]["stages"] = [TUNE[0] | {"name": "one", "sources": [0]}, TUNE[0] | {"sources": [1]}]
    recipe.write_text(json.dumps(content))
    monkeypatch.setattr("finetune.training.plan.rows.READ", 3)
    loaded = load_recipe(recipe).with_dtype("float32")
    rows = PlannedRows.of(loaded)
    assert len(rows.training) < rows.count == 13 and {sample.source for sample in rows.training} == {0, 1}
    planned = PlannedRun(loaded, rows)
    assert planned.stage_rows(loaded.train.stages[0], None, RowKind.PACKED, 0).rows == 1
    tokens = planned.stage_rows(loaded.train.stages[1], None, RowKind.PACKED, 0).tokens
    assert tokens == pytest.approx(12 * planned.samples.lengths[1], rel=0.2)


def test_shorter_rows_take_less(folder, usual):
    def activations(result):
        return next(phase.parts["activations"] for phase in result.phases if phase.name == "train tune")

    short = plan(recipe_in(folder, train__tokens_per_batch=48), "t4", advise=False)
    assert activations(short) < 0.7 * activations(usual)


@pytest.mark.parametrize(("share", "status", "said"), [(0.95, 1, "is tight on t4"), (1.1, 2, "doesn't fit t4")])
def test_the_command_ends_with_its_status(share, status, said, folder, usual, monkeypatch):
    monkeypatch.setitem(CARDS, "t4", replace(usual.card, memory=usual.needed / share / GIB))
    done = cli("plan", tiny_recipe(folder, train__stages=TUNE), "--gpu", "t4")
    assert done.returncode == status and said in done.stdout


@pytest.mark.slow
def test_recordings_of_different_lengths_are_planned(tmp_path):
    """Ten, of which eight are decoded: each of these has its own placeholders, the others the longest's."""
    audio, rows = tiny_audio_folder(tmp_path / "audio"), tmp_path / "rows"
    rows.mkdir()
    lines = ["audio,label"]
    for number in range(12):
        soundfile.write(rows / f"{number}.wav", tiny_sound(0.5 + 0.1 * number, seed=number), 16_000)
        lines.append(f"{number}.wav,{'ab'[number % 2]}")
    (rows / "train.csv").write_text("\n".join(lines[:11]))
    (rows / "test.csv").write_text("\n".join([lines[0], *lines[11:]]))
    task = {"kind": "classify", "media": ["audio"]}
    data = [{"path": str(rows / f"{split}.csv"), "task": task, "split": split} for split in ("train", "test")]
    parts = {"model__encoders": {"audio": {"kind": "whisper", "name": str(audio)}}, "train__tokens_per_batch": 2048}
    parts["model__projectors"] = {"audio": {"kind": "stack", "factor": 2}}
    result = plan(recipe_in(tmp_path, data=data, **parts), "t4", advise=False)
    assert {phase.name for phase in result.phases} == {"encode audio", "train tune", "evaluate"}


@pytest.mark.slow
def test_changes_are_planned_again_and_take_less(folder, monkeypatch):
    """A card so small that the tiny model doesn't fit it: half a GiB for CUDA, and a megabyte and a half."""
    monkeypatch.setattr("finetune.training.plan.plan.SIZES", (0.517,))
    monkeypatch.setattr("finetune.training.plan.plan.TIGHT", 1.0)
    result = plan(recipe_in(folder, evaluate={"batch": 2, "max_new_tokens": 4}), "t4")
    assert "train.checkpoint_every_n_layers" in result.changes[0].keys
    needed = [result.needed, *(change.needed for change in result.changes)]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == len(needed)
    changes = [f"{key}={json.dumps(value)}" for key, value in result.changes[-1].keys.items()]
    again = plan(load_recipe(folder / "recipe.yaml", changes), "t4", advise=False)
    assert again.needed == result.changes[-1].needed
    assert result.fit(result.needed / GIB).keys == {}
    assert result.fit(result.changes[0].needed / GIB) == result.changes[0]
    assert result.fit(0.1) is None


def test_the_command_prints_a_table(folder):
    done = cli("plan", tiny_recipe(folder, train__stages=TUNE), "--gpu", "t4", "--rent", "2")
    assert done.returncode == 0, done.stderr
    assert "activations" in done.stdout and "tune" in done.stdout and "24 GB: fits" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("tiny: 0.5 GiB, fits t4 (14.6 GiB); about ")


def test_the_command_prints_json(folder):
    done = cli("plan", tiny_recipe(folder, train__stages=TUNE), "--gpu", "l4", "--json")
    content = json.loads(done.stdout)
    assert content["fits"] == {f"{size} GB": {} for size in (6, 8, 12, 16, 24)}
    assert content["dtype"] == "bfloat16" and content["exit_status"] == done.returncode == 0


@pytest.mark.parametrize(("share", "status"), [(0.89, 0), (0.95, 1), (1.01, 2)])
def test_the_exit_status_says_whether_it_fits(usual, share, status):
    card = replace(usual.card, memory=usual.needed / share / GIB)
    assert replace(usual, card=card).exit_status == status


@pytest.mark.slow
def test_checkpoints_are_automatic_where_the_card_is_small(tmp_path, monkeypatch):
    """As few as leave training less than 90% of the card, of three layers."""
    tiny_llm_folder(tmp_path / "llm", num_hidden_layers=3)
    tiny_vision_folder(tmp_path / "encoder")
    measured: dict[int | str, Measured] = {}

    def measure_once(recipe: Recipe, rows: PlannedRows, gpu: bool) -> Measured:
        every = recipe.train.checkpoint_every_n_layers
        if every not in measured:
            measured[every] = measure(recipe, rows, gpu)
        return measured[every]

    monkeypatch.setattr("finetune.training.plan.plan.measure", measure_once)
    planned = [plan(recipe_in(tmp_path, train__checkpoint_every_n_layers=n), "t4", advise=False) for n in range(4)]
    needed = [result.needed for result in planned]
    assert needed[0] > needed[3] > needed[2] > needed[1] and planned[2].checkpoints_reason == ""
    recipe = recipe_in(tmp_path, train__checkpoint_every_n_layers="auto")
    for memory, expected in ((needed[0], 0), (needed[2], 2), (needed[3] - 1, 2), (needed[1] // 2, 1)):
        card = replace(CARDS["t4"], memory=(memory + 0.5) / TIGHT / GIB)
        monkeypatch.setattr("finetune.training.plan.plan.card_named", lambda name, card=card: card)
        result = plan(recipe, "small", advise=False)
        assert (result.checkpoints, result.needed) == (expected, needed[expected])
        assert f"checkpoint_every_n_layers: {expected}, training takes 0." in result.checkpoints_reason
        assert result.checkpoints_reason in result.notes


def test_other_phases_ask_for_no_checkpoints(folder, monkeypatch):
    """Where answers take more than training, checkpoints wouldn't help."""
    monkeypatch.setattr("finetune.training.plan.plan.CONTEXT", 0)
    recipe = recipe_in(folder, train__checkpoint_every_n_layers="auto", evaluate={"batch": 256, "max_new_tokens": 64})
    roomy = plan(recipe, "t4", advise=False)
    assert roomy.fullest.name == "evaluate"
    monkeypatch.setitem(CARDS, "t4", replace(CARDS["t4"], memory=roomy.needed / GIB))
    tight = plan(recipe, "t4", advise=False)
    assert (tight.exit_status, tight.checkpoints) == (1, 0)


def test_memory_that_others_hold_is_not_planned_with(monkeypatch):
    """But what CUDA keeps for itself in this process, and in the run that waits for its plan, is."""
    properties = SimpleNamespace(name="Tesla T4", total_memory=15 * GIB)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: properties)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (7, 5))
    for free, memory in ((15, 15), (14.2, 15), (4, 5)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda index, free=free: (int(free * GIB), 15 * GIB))
        card = own_card()
        assert (card.memory, card.tflops, card.bfloat16) == (memory, CARDS["t4"].tflops, False)


def test_a_run_without_a_gpu_has_no_automatic_checkpoints(folder):
    recipe = recipe_in(folder, train__checkpoint_every_n_layers="auto")
    assert without_auto(recipe, gpu=False).train.checkpoint_every_n_layers == 0
    with pytest.raises(RecipeError, match="checkpoint_every_n_layers"):
        recipe_in(folder, train__checkpoint_every_n_layers=-1)


@pytest.mark.slow
def test_the_largest_row_that_fits(folder, usual):
    recipe = recipe_in(folder)
    assert largest_tokens_per_batch(recipe, 512, usual.card) == 512
    small = replace(usual.card, memory=usual.needed / TIGHT / GIB)
    found = largest_tokens_per_batch(recipe, 384, small)
    twice = plan(recipe_in(folder, train__tokens_per_batch=2 * found), "t4", advise=False)
    assert found == 96 and twice.needed > usual.needed


@pytest.mark.slow
def test_what_cannot_be_planned_has_no_plan(folder, monkeypatch):
    monkeypatch.setattr("finetune.training.plan.apart.subprocess.Popen", forked.popen)
    with planning(tiny_recipe(folder, train__stages=TUNE), ["model.no=such"]) as finish:
        assert finish(300) is None


def test_models_that_are_not_at_hand_are_not_planned(folder):
    recipe = load_recipe(tiny_recipe(folder, train__stages=TUNE), ["model.llm.name=no/such"])
    with pytest.raises(ModelError, match="no/such"):
        plan(recipe, "t4", advise=False)


@pytest.mark.slow
def test_a_run_has_its_plan_beside_what_was_measured(tmp_path, monkeypatch, capsys):
    """As on a GPU, on a CPU: seconds, and no peak of a GPU's memory to be set beside the planned one."""
    monkeypatch.setattr("finetune.training.train.default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("finetune.training.plan.apart.subprocess.Popen", forked.popen)
    recipe = load_recipe(tiny_recipe(tmp_path, train__stages=TUNE))
    metrics = Metrics.model_validate(train(recipe, tmp_path / "run").read_metrics())
    assert metrics.planned_seconds.keys() == {"encode", "llm", "evaluate"}
    assert metrics.planned_memory_bytes["train_cuda"] > 10**5
    parts = planned_beside(metrics)
    printed = capsys.readouterr().err
    assert len(parts) == 2 and all(f"{part}: {amounts}" in printed for part, amounts in parts)
    peaks = metrics.model_copy(update={"peak_memory_bytes": {"train_cuda": 3 * 2**30}})
    assert planned_beside(peaks)[0][1].endswith(" planned, 3.00 GiB measured")


def test_no_plan_is_not_taken_for_a_tight_card(folder):
    done = cli("plan", tiny_recipe(folder), "--set", "model.llm.name=nobody/nothing")
    assert done.returncode == 2 and "nobody/nothing" in done.stderr


def test_an_unknown_card_is_a_mistake_of_the_command_line(folder):
    done = cli("plan", tiny_recipe(folder), "--gpu", "t5")
    assert done.returncode == 2 and "--gpu t5" in done.stderr and "rtx3060-12gb" in done.stderr
    with pytest.raises(RecipeError, match="t5"):
        plan(recipe_in(folder), "t5")


@pytest.mark.parametrize(
    ("device", "memory", "name"),
    [
        ("NVIDIA A10G", 22.0, "a10"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80gb"),
        ("Tesla T4", 14.6, "t4"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("NVIDIA L40S", 44.4, None),
        ("NVIDIA GeForce RTX 3080", 9.8, None),
    ],
)
def test_a_device_is_the_card_of_its_name(device, memory, name):
    card = card_like(device, memory)
    assert (card and card.name) == name


def test_money_is_hours_times_rent(usual):
    rented = replace(usual, card=replace(usual.card, rent=3.0))
    assert rented.dollars == pytest.approx(3 * sum(usual.seconds.values()) / 3600) and rented.dollars > 0


def test_a_plan_reads_no_torch_before_the_recipe_is_right():
    code = "import finetune.commands.plan, sys; assert not {'torch', 'transformers'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class TestMeter:
    def test_counts_what_is_alive_and_the_most_there_was(self):
        with Meter() as meter:
            first = torch.ones(1000)
            view = first[10:].view(-1, 2)
            assert meter.live == 4000
            second = torch.ones(500) + 1
            assert meter.live == 6000 and meter.peak == 8000
            del second
            assert meter.live == 4000
            del first
            assert meter.live == 4000  # the view holds it
            del view
            assert meter.live == 0

    def test_values_of_whole_numbers_are_known_without_data(self):
        with Rehearsal() as meter:
            weights = torch.empty(10**6, 10**3)
            ids = torch.arange(6)
            assert int((ids % 2 == 0).sum()) == 3
            assert weights[ids[ids > 3]].shape == (2, 1000)
            assert weights[:6][ids > 3].shape == (2, 1000)
            assert (torch.zeros_like(weights[0], dtype=torch.long) == 0).all()
            assert meter.live > 4 * 10**9
            with with_data():
                assert torch.ones(2).sum().item() == 2

    def test_multiplications_are_counted(self):
        with Rehearsal() as meter:
            torch.empty(3, 5) @ torch.empty(5, 7)
            assert meter.flops == 2 * 3 * 5 * 7

    def test_norms_are_in_float32_under_a_gpus_autocast(self):
        with AutocastOnGpu(torch.bfloat16):
            halves = torch.nn.functional.linear(torch.ones(2, 4), torch.ones(4, 4))
            assert halves.dtype == torch.bfloat16
            assert torch.nn.functional.layer_norm(halves, (4,)).dtype == torch.float32
