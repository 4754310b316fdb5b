"""What a teacher adds where rows are few: students that learn some of the quickstart's pictures by their answers
(next_token), or by the next-token distributions of a model that was tuned on all of them (distill).

    python -m benchmarks.teacher --seeds 1 2 3 --into runs/teacher    # keep the runs, read those there

Students begin with the same weights, see the same rows and take the same steps. The score is the accuracy on pictures
that neither training saw, with the CPU seconds of a student's run, its teacher's forward passes included.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.rewards import EMOJI, ROOT, TASK, cpu_seconds, finetune

STAGE = {"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 4e-4}
RATES = {"learning_rates": {"projectors": 1e-3}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", type=int, default=87, help="that students learn, of 870")
    parser.add_argument("--epochs", type=int, default=12, help="of students")
    parser.add_argument("--teacher", type=Path, help="a run on all rows (default: three epochs of them, seed 0)")
    parser.add_argument("--into", type=Path, help="folder of runs (default: a temporary one)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.into or Path(temporary)
        teacher = chosen.teacher or folder / "teacher"
        if not (teacher / "metrics.json").is_file():
            train(write_recipe(folder / "all.yaml", 870, 3), teacher, 0, "next_token")
        recipe = write_recipe(folder / "few.yaml", chosen.rows, chosen.epochs)
        distill = {"kind": "distill", "teacher": str(teacher.resolve()), "answers": "given"}
        objectives: dict[str, Any] = {"next_token": "next_token", "distill": distill}
        found = {
            (seed, name): train(recipe, folder / f"{chosen.rows}x{chosen.epochs}-seed-{seed}-{name}", seed, objective)
            for seed in chosen.seeds
            for name, objective in objectives.items()
        }
        show(found, score_of(teacher))
    return 0


def write_recipe(path: Path, count: int, epochs: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (EMOJI / "train.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "label"])
        writer.writerows(
            [str(EMOJI / row["image"]), row["label"]] for row in rows[:: max(1, len(rows) // count)][:count]
        )
    recipe = yaml.safe_load((ROOT / "recipes/quickstart.yaml").read_text(encoding="utf-8"))
    recipe["model"]["llm"]["name"] = str(ROOT / "weights/minimind2-small")
    recipe["model"]["encoders"]["image"]["name"] = str(ROOT / "weights/mobilenet-v2")
    recipe["data"] = [
        {"path": path.with_suffix(".csv").name, "task": dict(TASK), "outside_media_folder": True},
        {"path": str(EMOJI / "test.csv"), "task": dict(TASK), "split": "validation"},
    ]
    recipe["train"]["stages"] = [STAGE | RATES | {"epochs": epochs}]
    recipe["train"]["validation"] = {"every_n_steps": 1_000_000, "limit": None}  # as a stage begins and ends
    recipe["evaluate"]["split"] = "validation"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path


def train(recipe: Path, into: Path, seed: int, objective: Any) -> tuple[float, int, float]:
    """(accuracy, steps, CPU seconds) of a process of its own."""
    spent = into.with_suffix(".json")
    if not (into / "metrics.json").is_file():
        before = cpu_seconds()
        settings = [f"seed={seed}", f"train.stages.0.objective={json.dumps(objective)}"]
        finetune("train", str(recipe), "--run", str(into), *[part for one in settings for part in ("--set", one)])
        spent.write_text(json.dumps(cpu_seconds() - before))
    stage = json.loads((into / "metrics.json").read_text(encoding="utf-8"))["train"]["stages"]["tune"]
    return score_of(into), stage["steps"], json.loads(spent.read_text())


def score_of(run: Path) -> float:
    """Of the last validation pass."""
    stages = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["train"]["stages"]
    return float([*stages.values()][-1]["validation"][-1]["score"])


def show(found: dict[tuple[int, str], tuple[float, int, float]], teacher: float) -> None:
    console = Console(width=120)
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    console.print(f"{date.today()}, {platform.machine()}, {threads} threads, Python {platform.python_version()}")
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("seed", "objective", "accuracy", "steps", "CPU"):
        table.add_column(heading, justify="right")
    for (seed, name), (score, steps, seconds) in found.items():
        table.add_row(str(seed), name, f"{score:.3f}", str(steps), f"{seconds:.0f} s")
    for name in dict.fromkeys(name for _, name in found):
        own = [one for (_, other), one in found.items() if other == name]
        score, _, seconds = (statistics.mean(values) for values in zip(*own, strict=True))
        table.add_row("mean", name, f"{score:.3f}", "", f"{seconds:.0f} s")
    console.print(table)
    console.print(f"the teacher: {teacher:.3f}")


if __name__ == "__main__":
    sys.exit(main())
