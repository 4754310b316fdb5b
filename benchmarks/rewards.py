"""What a stage of rewards adds to a tuned model: the quickstart, trained on every other picture, then on some of the
pictures between them, by the rewards of its own sampled answers (grpo) or by their right answers (next_token).

    python benchmarks/rewards.py --seeds 1 2 3 --into runs/rewards    # keep the runs, read those there

Both last stages begin with the same weights and see the same rows. The score is the accuracy on pictures that training
never saw, before and after this stage, with the CPU seconds that it took.
"""

import argparse
import csv
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
EMOJI = ROOT / "recipes/data/emoji"
TASK = {"kind": "classify", "prompt": "图片里是什么？"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {"kind": "grpo", "answers": 8, "max_new_tokens": 6},
    "next_token": {"kind": "next_token"},
}


@dataclass(frozen=True)
class Found:
    """Accuracy before and after the last stage; the share of its groups without signal and the mean reward in the
    first and the last tenth of its steps, where it has rewards; `cpu_minutes`: those of the run, by the stage's share
    of its time.
    """

    before: float
    after: float
    no_signal: float | None
    rewards: tuple[float, float] | None
    steps: int
    cpu_minutes: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", type=int, default=435, help="of the last stage, 435 at most")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of the last stage")
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--into", type=Path, help="folder of runs (default: a temporary one)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.into or Path(temporary)
        recipe = write_recipe(folder, chosen.rows, chosen.rate)
        found = {(seed, name): run(recipe, folder, seed, name) for seed in chosen.seeds for name in chosen.objectives}
    show(found)
    return 0


def write_recipe(folder: Path, count: int, rate: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (EMOJI / "train.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    data: list[dict[str, Any]] = []
    for name, part in (("first", rows[::2]), ("between", rows[1 :: 2 * (435 // count)][:count])):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["image", "label"])
            writer.writerows([str(EMOJI / row["image"]), row["label"]] for row in part)
        data.append({"path": f"{name}.csv", "task": dict(TASK), "outside_media_folder": True})
    data.append({"path": str(EMOJI / "test.csv"), "task": dict(TASK), "split": "validation"})
    recipe = yaml.safe_load((ROOT / "recipes/quickstart.yaml").read_text(encoding="utf-8"))
    recipe["model"]["llm"]["name"] = str(ROOT / "weights/minimind2-small")
    recipe["model"]["encoders"]["image"]["name"] = str(ROOT / "weights/mobilenet-v2")
    tune = {"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 4e-4, "epochs": 3, "sources": [0]}
    last = {"name": "last", "trains": ["projectors", "adapter"], "learning_rate": rate, "scheduler": "constant"}
    recipe["train"]["stages"] = [tune | {"learning_rates": {"projectors": 1e-3}}, last | {"sources": [1]}]
    recipe["train"]["validation"] = {"every_n_steps": 1_000_000, "limit": None}  # as a stage begins and ends
    recipe["evaluate"]["split"] = "validation"
    path = folder / "rewards.yaml"
    path.write_text(yaml.safe_dump({**recipe, "data": data}, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path


def run(recipe: Path, folder: Path, seed: int, objective: str) -> Found:
    """Train in a process of its own."""
    into, spent = folder / f"seed-{seed}-{objective}", folder / f"seed-{seed}-{objective}.json"
    if not (into / "metrics.json").is_file():
        settings = [f"seed={seed}", f"train.stages.1.objective={json.dumps(OBJECTIVES[objective])}"]
        before = cpu_seconds()
        finetune("train", str(recipe), "--run", str(into), *[part for one in settings for part in ("--set", one)])
        spent.write_text(json.dumps(cpu_seconds() - before))
    train = json.loads((into / "metrics.json").read_text(encoding="utf-8"))["train"]["stages"]
    stage = train["last"]
    passes, rewards = stage["validation"], stage["figures"].get("reward")
    tenth = max(len(rewards) // 10, 1) if rewards else 0
    share = stage["seconds"] / sum(one["seconds"] for one in train.values())
    return Found(
        before=passes[0]["score"],
        after=passes[-1]["score"],
        no_signal=statistics.mean(stage["figures"]["no_signal"]) if rewards else None,
        rewards=(statistics.mean(rewards[:tenth]), statistics.mean(rewards[-tenth:])) if rewards else None,
        steps=stage["steps"],
        cpu_minutes=json.loads(spent.read_text()) * share / 60,
    )


def cpu_seconds() -> float:
    """Of all processes that this one has begun and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def finetune(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "finetune.commands.cli", *arguments], check=True, cwd=ROOT)


def show(found: Mapping[tuple[int, str], Found]) -> None:
    console = Console(width=120)
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    console.print(f"{date.today()}, {platform.machine()}, {threads} threads, Python {platform.python_version()}")
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("seed", "last stage", "before", "after", "reward", "no signal", "steps", "CPU"):
        table.add_column(heading, justify="right")
    for (seed, name), one in found.items():
        rewards = "{:.2f} to {:.2f}".format(*one.rewards) if one.rewards else ""
        signal = f"{one.no_signal:.0%}" if one.no_signal is not None else ""
        scores = (f"{one.before:.3f}", f"{one.after:.3f}")
        table.add_row(str(seed), name, *scores, rewards, signal, str(one.steps), f"{one.cpu_minutes:.1f} min")
    for name in dict.fromkeys(name for _, name in found):
        own = [one for (_, other), one in found.items() if other == name]
        before, after = (statistics.mean(getattr(one, key) for one in own) for key in ("before", "after"))
        minutes = statistics.mean(one.cpu_minutes for one in own)
        table.add_row("mean", name, f"{before:.3f}", f"{after:.3f}", "", "", "", f"{minutes:.1f} min")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
