"""Every workload of the comparison with trl, at toy size: equal losses where the steps hold equal samples."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.train_vs_trl import ours, peer
from benchmarks.train_vs_trl.__main__ import parse
from benchmarks.train_vs_trl.options import Options
from benchmarks.train_vs_trl.prepare import write_all
from benchmarks.train_vs_trl.report import compared, summary
from benchmarks.train_vs_trl.workload import names
from finetune.common.progress import console

pytestmark = pytest.mark.slow
TOY = ["--parts", "toy", "--pictures", "4", "--epochs", "2", "--questions", "2", "--rank", "4", "--threads", "1"]


def toy(name: str, folder: Path) -> Options:
    parsed = vars(parse([name, *TOY, "--tokens-per-batch", "2048" if name == "conversations" else "256"]))
    options = Options(folder=folder, **{key: parsed[key] for key in Options.__dataclass_fields__ if key != "folder"})
    options.save()
    return Options.load(folder)


@pytest.fixture(autouse=True)
def loud_again(monkeypatch):
    """The console of this process, which the comparison silences."""
    monkeypatch.setattr(console, "quiet", False)


@pytest.mark.parametrize("name", [name for name in names() if name != "rewards"])
def test_the_losses_are_those_of_trl_over_the_same_steps(name, tmp_path):
    options = toy(name, tmp_path)
    facts = write_all(options)
    runs = [{"round": 0, "kind": "ours", **ours.train(options, "ours")}]
    runs.append({"round": 0, "kind": "peer-steps", **peer.train(options, "peer-steps")})
    found = json.loads(json.dumps(summary(compared(runs))))
    assert found["loss_difference"][1] < 1e-3
    assert found["spread"] == [found["ratio"]] * 2 and found["memory_ratio"] > 0
    assert facts["samples"] == sum(map(len, runs[0]["steps"]))
    shared = facts["ours"]["tokens"] < facts["peer"]["tokens"]
    assert shared == (name in ("preferences", "questions", "text")) and facts["ours"]["encoded"] == 4 * (name != "text")


def test_rewards_are_learned_by_both(tmp_path):
    """From answers of their own."""
    options = toy("rewards", tmp_path)
    facts = write_all(options)
    found = ours.train(options, "ours")
    runs = [{"round": 0, "kind": "ours", **found}, {"round": 0, "kind": "peer", **peer.train(options, "peer")}]
    assert summary(compared(runs))["ratio"] > 0 and facts["ours"]["tokens"] < facts["peer"]["tokens"] / 2
    assert peer.train(options, "peer-steps")["losses"]


def test_other_peers_learn(tmp_path):
    options = toy("questions", tmp_path)
    write_all(options)
    for kind in ("peer", "peer-compact", "peer-turns", "peer-checkpointed"):
        assert peer.train(options, kind)["losses"]
