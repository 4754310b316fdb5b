"""How fast `finetune data check` is, and that its memory doesn't grow with the rows.

    make weights && python benchmarks/data_check.py [--rows 1000 10000 100000] [--kinds text image] [--workers N]

Rows are made up: questions and answers of a few words, or pictures of 64 x 64 pixels, each different, with a label. The
tokenizer and the encoder are those of the quickstart. Memory is the sum over the process, its workers and their server:
what each has for itself, and its part of what it shares (PSS), sampled four times a second.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import psutil

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
WORDS = ("the", "red", "small", "house", "tree", "river", "猫", "狗", "在", "红色", "房子", "is", "not", "what", "how")


def make(folder: Path, kind: str, rows: int) -> Path:
    """A recipe with `rows` training rows and a tenth as many test rows."""
    chance = random.Random(0)
    for split, count in (("train", rows), ("test", rows // 10)):
        with (folder / f"{split}.csv").open("w", encoding="utf-8") as file:
            file.write("image,label\n" if kind == "image" else "question,answer\n")
            for number in range(count):
                if kind == "text":
                    said = [" ".join(chance.choices(WORDS, k=length)) for length in (20, 12)]
                    file.write(f"{said[0]} {split} {number},{said[1]}\n")
                    continue
                name = f"{split}/{number // 1000}/{number}.png"
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                coarse = np.random.default_rng((split == "test", number)).integers(0, 256, (8, 8, 3), np.uint8)
                PIL.Image.fromarray(coarse).resize((64, 64)).save(folder / name)
                file.write(f"{name},{WORDS[number % 10]}\n")
    task = {"text": {"kind": "answer", "media": []}, "image": {"kind": "classify"}}[kind]
    encoder = {"image": {"kind": "vision", "name": str(WEIGHTS / "mobilenet-v2")}}
    recipe = {
        "name": kind,
        "model": {
            "llm": {"name": str(WEIGHTS / "minimind2-small")},
            **({"encoders": encoder, "projectors": {"image": "mlp"}} if kind == "image" else {}),
        },
        "data": [
            {"path": "train.csv", "task": task},
            {"path": "test.csv", "task": task, "split": "test"},
        ],
        "train": {"stages": [{"name": "tune", "trains": ["adapter"], "learning_rate": 1e-4}]},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def measure(recipe: Path, workers: int) -> tuple[float, float, dict]:
    """(seconds, peak bytes, check.json's summary) of a check in a process of its own."""
    out = recipe.parent / "out"
    command = [sys.executable, "-m", "finetune.commands.cli", "data", "check", str(recipe), "--out", str(out)]
    begin = time.perf_counter()
    with subprocess.Popen([*command, "--workers", str(workers)], stdout=subprocess.DEVNULL, stderr=sys.stderr) as done:
        peak = 0
        while done.poll() is None:
            peak = max(peak, held(done.pid))
            time.sleep(0.25)
    seconds = time.perf_counter() - begin
    if done.returncode not in (0, 2):
        raise SystemExit(done.returncode)
    head = (out / "check.json").read_text(encoding="utf-8").partition('"list"')[0]
    return seconds, peak, json.loads(head.rstrip().rstrip(",") + "}")


def held(pid: int) -> int:
    """Bytes of a process and all below it."""
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it has ended since
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--kinds", nargs="+", default=["text", "image"], choices=["text", "image"])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    print(f"{'rows':<8}{'number':>9}{'seconds':>10}{'rows/s':>9}{'MiB':>8}  findings   ({given.workers} workers)")
    for kind in given.kinds:
        for rows in given.rows:
            with tempfile.TemporaryDirectory() as folder:
                recipe = make(Path(folder), kind, rows)
                seconds, peak, result = measure(recipe, given.workers)
            read = result["rows"]
            print(
                f"{kind:<8}{read:>9,}{seconds:>10.1f}{read / seconds:>9,.0f}{peak / 2**20:>8,.0f}  {result['findings']}"
            )


if __name__ == "__main__":
    main()
