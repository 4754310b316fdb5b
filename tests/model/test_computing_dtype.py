"""The dtype of a run whose recipe says `auto`: measured once, kept, and the device's usual one unless another is much
faster.
"""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from tiny import tiny_llm_folder, tiny_recipe
from torch.nn import functional

from finetune.model import computing_dtype
from finetune.model.computing_dtype import FeedForward, measured_dtype, rounds, times_as_fast
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Llm
from finetune.training.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llm_folder(tmp_path_factory.mktemp("dtype") / "llm")


@pytest.fixture(autouse=True)
def nothing_measured_yet(monkeypatch):
    monkeypatch.setattr(computing_dtype, "NARROWEST", 64)
    computing_dtype._faster.cache_clear()
    yield
    computing_dtype._faster.cache_clear()


@pytest.mark.parametrize(("times", "dtype"), [(0.12, "auto"), (1.0, "auto"), (2.9, "auto"), (3.0, "bfloat16")])
def test_another_dtype_is_taken_where_it_is_much_faster(times, dtype, folder, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(computing_dtype, "times_as_fast", lambda *of: asked.append(of) or times)
    assert [measured_dtype(Llm(name=str(folder)), CPU) for _ in range(2)] == [dtype, dtype]
    assert asked == [(64, "nf4", CPU, torch.float32, torch.bfloat16)]  # once; and never float16 on a CPU
    printed = " ".join(capsys.readouterr().err.split())
    taken = "bfloat16" if times >= 3 else "float32"
    assert f"dtype: {taken}; a layer of the LLM is {times:.1f} times as fast in bfloat16 as in float32" in printed


def test_what_is_written_or_too_small_is_not_measured(folder, monkeypatch):
    monkeypatch.setattr(computing_dtype, "times_as_fast", lambda *of: pytest.fail("measured"))
    assert measured_dtype(Llm(name="no/such", dtype="float32"), CPU) == "float32"
    assert measured_dtype(Llm(name="no/such", quantize="int8"), CPU) == "auto"
    monkeypatch.setattr(computing_dtype, "NARROWEST", 65)
    assert measured_dtype(Llm(name=str(folder)), CPU) == "auto"


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_layer_computes_what_it_says(quantize):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    whole, half = (FeedForward(64, quantize, dtype, CPU) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(torch.get_rng_state(), before)  # a run's own random numbers stay what they were
    products = {}
    for name, layer in whole.frozen.items():
        weight = layer.weight if quantize == "none" else dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        products[name] = weight + whole.lora[f"{name}_b"] @ whole.lora[f"{name}_a"]
    rows = functional.rms_norm(whole.inputs, (64,))
    exact = whole.inputs + (functional.silu(rows @ products["gate"].T) * (rows @ products["up"].T)) @ products["down"].T
    assert torch.allclose(whole(), exact, atol=1e-4)
    assert half().dtype == torch.bfloat16 and (half().float() - exact).norm() < 0.02 * exact.norm()
    assert whole.inputs.requires_grad and not any(p.requires_grad for p in whole.frozen.parameters())


def test_the_median_of_the_rounds_counts_and_the_first_does_not(monkeypatch):
    monkeypatch.setattr(computing_dtype, "ROUNDS", 3)
    now = [0.0]
    durations = iter([50, 1, 6, 2, 8, 2, 900, 2])

    def step() -> None:
        now[0] += next(durations) / 1000

    found = list(rounds(step, step, lambda: now[0]))
    assert [round(one / another) for one, another in found] == [3, 4, 450]
    monkeypatch.setattr(computing_dtype, "rounds", lambda *_: iter(found))
    threads = torch.get_num_threads()
    assert times_as_fast(64, "none", CPU, torch.float32, torch.bfloat16) == pytest.approx(4)
    assert torch.get_num_threads() == threads


def test_a_measurement_ends_after_a_second():
    now = [0.0]

    def step() -> None:
        now[0] += 0.6

    assert len(list(rounds(step, step, lambda: now[0]))) == 1


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_this_machine_can_be_measured(quantize):
    assert 0.01 < times_as_fast(64, quantize, CPU, torch.float32, torch.bfloat16) < 20


def test_a_run_keeps_the_dtype_that_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr(computing_dtype, "times_as_fast", lambda *_: 3.0)
    stages = [{"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 1.0e-3}]
    recipe = load_recipe(tiny_recipe(tmp_path, train__stages=stages))
    run = train(recipe, tmp_path / "run")
    assert recipe.model.llm.dtype == "auto" and load_recipe(run.recipe).model.llm.dtype == "bfloat16"
    monkeypatch.setattr(computing_dtype, "times_as_fast", lambda *_: pytest.fail("measured anew"))
    computing_dtype._faster.cache_clear()
    assert load_recipe(train(recipe, run, resume=True).recipe).model.llm.dtype == "bfloat16"


def test_the_usual_dtype_stays_auto_for_other_devices(tmp_path, monkeypatch):
    """A run of a CPU, in float32, may be evaluated on a GPU."""
    monkeypatch.setattr(computing_dtype, "times_as_fast", lambda *_: 1.5)
    stages = [{"name": "tune", "trains": ["projectors"], "learning_rate": 1.0e-3}]
    recipe = load_recipe(tiny_recipe(tmp_path, train__stages=stages))
    run = train(recipe, tmp_path / "run")
    assert load_recipe(run.recipe).model.llm.dtype == "auto"
    monkeypatch.setattr(computing_dtype, "times_as_fast", lambda *_: pytest.fail("measured anew"))
    computing_dtype._faster.cache_clear()
    assert load_recipe(train(recipe, run, resume=True).recipe).model.llm.dtype == "auto"
