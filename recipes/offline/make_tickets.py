"""Make recipes/data/tickets: tables that pair a picture with a spoken request; the answer needs both.

    python recipes/offline/make_tickets.py [--data recipes/data] [--into recipes/data/tickets]

Pictures are those of emoji/, recordings those of calls/, and none is copied: paths are relative to the folder that
holds both. Who meets whom is drawn by a fixed seed. Rows to train on come from the two train.csv only, rows to test on
from the two test.csv only.
"""

import argparse
import csv
import itertools
import random
import sys
from pathlib import Path

SEED = 24
ROWS_PER_PAIR = {"train": 8, "test": 2}  # of intent and label: 72 pairs
DATA = Path(__file__).resolve().parents[1] / "data"


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def in_turn(rows: list[dict[str, str]], key: str, medium: str, draw: random.Random) -> dict[str, itertools.cycle]:
    """For each value of `key` its media in a drawn order, none a second time before all have been taken."""
    media: dict[str, list[str]] = {}
    for row in rows:
        media.setdefault(row[key], []).append(row[medium])
    for files in media.values():
        draw.shuffle(files)
    return {value: itertools.cycle(files) for value, files in sorted(media.items())}


def plan(pictures: list[dict[str, str]], calls: list[dict[str, str]], split: str) -> list[dict[str, str]]:
    """The rows of a table. Every intent goes with every label equally often."""
    draw = random.Random(f"{SEED}/{split}")
    images, recordings = in_turn(pictures, "label", "image", draw), in_turn(calls, "intent", "audio", draw)
    pairs = list(itertools.product(recordings, images)) * ROWS_PER_PAIR[split]
    draw.shuffle(pairs)
    return [
        {
            "image": f"emoji/{next(images[label])}", "audio": f"calls/{next(recordings[intent])}",
            "answer": f"{intent}：{label}", "intent": intent, "label": label,
        }
        for intent, label in pairs
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the tables of pictures with spoken requests.")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of emoji/ and calls/")
    parser.add_argument("--into", type=Path, default=DATA / "tickets")
    chosen = parser.parse_args()
    chosen.into.mkdir(parents=True, exist_ok=True)
    for split in ROWS_PER_PAIR:
        pictures, calls = (read_rows(chosen.data / source / f"{split}.csv") for source in ("emoji", "calls"))
        rows = plan(pictures, calls, split)
        with (chosen.into / f"{split}.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(split, len(rows), "rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
