"""Make recipes/data/tickets: tables that pair a picture with a spoken request; the answer needs both.

    python recipes/offline/make_tickets.py [--data recipes/data] [--into recipes/data/tickets]

Pictures are those of emoji/, recordings those of calls/, and none is copied: paths are relative to the folder that
holds both. Who meets whom is drawn by a fixed seed. Rows to train on come from the two train.csv only, rows to test on
from the two test.csv only.
"""

import itertools
import random

from dataset_files import Row, argument_parser, read_rows, shuffled_cycles, write_rows

SEED = 24
ROWS_PER_PAIR = {"train": 8, "test": 2}  # of intent and label: 72 pairs


def plan(pictures: list[Row], calls: list[Row], split: str) -> list[Row]:
    """The rows of a table. Every intent goes with every label equally often."""
    draw = random.Random(f"{SEED}/{split}")
    images = shuffled_cycles(pictures, "label", "image", draw)
    recordings = shuffled_cycles(calls, "intent", "audio", draw)
    pairs = list(itertools.product(recordings, images)) * ROWS_PER_PAIR[split]
    draw.shuffle(pairs)
    return [
        {
            "image": f"emoji/{next(images[label])}", "audio": f"calls/{next(recordings[intent])}",
            "answer": f"{intent}：{label}", "intent": intent, "label": label,
        }
        for intent, label in pairs
    ]  # fmt: skip


def main() -> None:
    description = "Make the tables of pictures with spoken requests."
    chosen = argument_parser("tickets", description, reads="emoji/ and calls/").parse_args()
    for split in ROWS_PER_PAIR:
        pictures, calls = (read_rows(chosen.data / source / f"{split}.csv") for source in ("emoji", "calls"))
        rows = plan(pictures, calls, split)
        write_rows(chosen.into / f"{split}.csv", rows)
        print(split, len(rows), "rows")


if __name__ == "__main__":
    main()
