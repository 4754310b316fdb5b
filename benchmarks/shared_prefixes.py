"""Whether training learns as much where rows share their pictures: five questions about each picture, on the
quickstart's weights, trained with `train.share_prefixes` and without, from the same seeds.

    python benchmarks/shared_prefixes.py --seeds 1 2 3 --into runs/shared-prefixes    # keep the runs, read those there

Sharing changes nothing about a row's loss, but which rows a step holds. The score is the accuracy over the five
questions about pictures that training never saw, with the standard error of its mean over pictures.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
EMOJI = ROOT / "recipes/data/emoji"
ALIVE, MADE, ABOUT_PEOPLE = {"人物", "动物", "自然"}, {"旅行", "物品", "食物", "符号"}, {"人物", "表情", "活动"}
QUESTIONS = {  # by name of the task: what is asked, and the answer to a row of the table
    "group": ("图片里是什么？", lambda row: row["label"]),
    "group_en": ("Which group?", lambda row: row["label_en"]),
    "alive": ("是活的吗？", lambda row: "是" if row["label"] in ALIVE else "否"),
    "made": ("是做出来的吗？", lambda row: "是" if row["label"] in MADE else "否"),
    "people": ("和人有关吗？", lambda row: "有" if row["label"] in ABOUT_PEOPLE else "无"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--pictures", type=int, default=300, help="of training; tests take a third as many")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--into", type=Path, help="folder of runs (default: a temporary one)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.into or Path(temporary)
        recipe = write_recipe(folder, chosen.pictures, chosen.epochs)
        found = {(seed, share): run(recipe, folder, seed, share) for seed in chosen.seeds for share in (True, False)}
    show(found)
    return 0


def write_recipe(folder: Path, pictures: int, epochs: int) -> Path:
    """The recipe with its tables: a file a question and split."""
    folder.mkdir(parents=True, exist_ok=True)
    data: list[dict[str, Any]] = []
    for split, count in (("train", pictures), ("test", pictures // 3)):
        with (EMOJI / f"{split}.csv").open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        rows = rows[:: max(1, len(rows) // count)][:count]
        for name, (asked, answer) in QUESTIONS.items():
            with (folder / f"{split}-{name}.csv").open("w", encoding="utf-8", newline="") as stream:
                writer = csv.writer(stream)
                writer.writerow(["image", "label"])
                writer.writerows([str(EMOJI / row["image"]), answer(row)] for row in rows)
            task = {"kind": "classify", "prompt": asked}
            source = {"name": name, "path": f"{split}-{name}.csv", "task": task, "outside_media_folder": True}
            data.append(source | ({"split": "test"} if split == "test" else {}))
    recipe = yaml.safe_load((ROOT / "recipes/quickstart.yaml").read_text(encoding="utf-8"))
    recipe["model"]["llm"]["name"] = str(ROOT / "weights/minimind2-small")
    recipe["model"]["encoders"]["image"]["name"] = str(ROOT / "weights/mobilenet-v2")
    stages = recipe["train"]["stages"]
    stages[0]["epochs"], stages[1]["epochs"] = 1, epochs
    path = folder / "five-questions.yaml"
    path.write_text(yaml.safe_dump({**recipe, "data": data}, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path


def run(recipe: Path, folder: Path, seed: int, share: bool) -> dict[str, float]:
    """Train and evaluate in processes of their own."""
    into = folder / f"seed-{seed}-{'shared' if share else 'apart'}"
    if not (into / "metrics.json").is_file():
        settings = [f"seed={seed}", f"train.share_prefixes={str(share).lower()}"]
        finetune("train", str(recipe), "--run", str(into), *[part for one in settings for part in ("--set", one)])
    if "scores" not in (metrics := read(into)):
        finetune("evaluate", str(into))
        metrics = read(into)
    predictions = [json.loads(line) for line in (into / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    pictures = len(predictions) // len(QUESTIONS)
    accuracy = {name: metrics["scores"][name]["accuracy"]["tuned"] for name in QUESTIONS}
    mean = statistics.mean(accuracy.values())
    return {
        "mean": mean,
        "error": (mean * (1 - mean) / pictures) ** 0.5,  # as if a picture's five answers were one
        "group": accuracy["group"],
        "minutes": metrics["seconds"]["train"] / 60,
        "steps": sum(stage["steps"] for stage in metrics["train"]["stages"].values()),
    }


def read(run_folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))
    return found


def finetune(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "finetune.commands.cli", *arguments], check=True, cwd=ROOT)


def show(found: Mapping[tuple[int, bool], Mapping[str, float]]) -> None:
    console = Console(width=120)
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    console.print(f"{date.today()}, {platform.machine()}, {threads} threads, Python {platform.python_version()}")
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("seed", "prefixes", "accuracy", "±", "of the group", "steps", "training"):
        table.add_column(heading, justify="right")
    for (seed, share), one in found.items():
        cells = [f"{one['mean']:.3f}", f"{one['error']:.3f}", f"{one['group']:.3f}", f"{one['steps']:.0f}"]
        table.add_row(str(seed), "shared" if share else "apart", *cells, f"{one['minutes']:.1f} min")
    for share in (True, False):
        mean = statistics.mean(one["mean"] for (_, is_shared), one in found.items() if is_shared is share)
        minutes = statistics.mean(one["minutes"] for (_, is_shared), one in found.items() if is_shared is share)
        table.add_row("mean", "shared" if share else "apart", f"{mean:.3f}", "", "", "", f"{minutes:.1f} min")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
