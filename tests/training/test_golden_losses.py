"""The losses of every step of a few tiny runs are those that they were. Where a change is meant to move them, write
them anew: `python tests/helpers/golden_runs.py write`; `... part` says at which module two revisions part.
"""

import json

import golden_runs
import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", golden_runs.RUNS)
def test_losses_are_those_that_were_kept(name, tmp_path):
    kept, found = golden_runs.kept(name), golden_runs.losses(name, tmp_path)
    assert found.keys() == kept.keys()
    for stage, losses in kept.items():
        assert len(found[stage]) == len(losses), f"{stage}: {len(found[stage])} steps, not {len(losses)}"
        for step, (loss, other) in enumerate(zip(losses, found[stage], strict=True), 1):
            assert other == pytest.approx(loss, abs=1e-5), f"{name}: {stage} parts at step {step}"


def test_two_recordings_part_where_a_module_differs(tmp_path):
    calls = [["Linear", [1, 3], 2.0], ["Norm", [1, 3], 1.0]]
    for name, norm in (("a", 1.0), ("b", 1.000001), ("c", 1.001)):
        calls[1][2] = norm
        (tmp_path / name).write_text(json.dumps(calls))
    assert golden_runs.part(tmp_path / "a", tmp_path / "b") == "2 calls are equal"
    assert golden_runs.part(tmp_path / "a", tmp_path / "c").startswith("call 1: Norm [1, 3] of norm 1.0 |")


def test_recordings_name_the_module_where_they_part(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()))
    for name in ("a", "b"):
        with golden_runs.recorded() as calls:
            model(torch.ones(1, 3))
        (tmp_path / name).write_text(json.dumps(calls))
        torch.nn.init.ones_(model[1][0].weight)
    assert [name for name, _, _ in calls] == [
        "Sequential.0",
        "Sequential.1.0",
        "Sequential.1.1",
        "Sequential.1",
        "Sequential",
    ]
    assert golden_runs.part(tmp_path / "a", tmp_path / "b").startswith("call 1: Sequential.1.0 [1, 3] of norm ")
