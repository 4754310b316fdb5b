"""What the makers of data share: their arguments, the tables, and the folders and pictures beside them."""

import argparse
import csv
import itertools
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

DATA = Path(__file__).resolve().parents[1] / "data"

Row = dict[str, str]


def argument_parser(name: str, description: str, reads: str = "") -> argparse.ArgumentParser:
    """`--into`, by default recipes/data/NAME; with `reads`, `--data` too: the folder that holds what is read."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--into", type=Path, default=DATA / name, help="folder to write (default: %(default)s)")
    if reads:
        parser.add_argument("--data", type=Path, default=DATA, help=f"folder of {reads}")
    return parser


def empty_folder(folder: Path) -> None:
    """Make the folder, without what an earlier run left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def read_rows(file: Path) -> list[Row]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def write_rows(file: Path, rows: Sequence[Row], columns: Sequence[str] | None = None) -> None:
    """A CSV of these columns; without them, of the first row's, which all rows must then have."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as stream:
        extra = "ignore" if columns else "raise"
        writer = csv.DictWriter(stream, columns or list(rows[0]), extrasaction=extra, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_picture(picture: "Image.Image", file: Path, colours: int) -> None:
    """A small PNG: a palette of so many colours."""
    picture.quantize(colours).save(file, optimize=True)


def shuffled_cycles(rows: Sequence[Row], key: str, column: str, draw: random.Random) -> dict[str, Iterator[str]]:
    """{value of `key`, sorted: its values of `column` in a drawn order, none repeated before all have been taken}."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row[column])
    for values in groups.values():
        draw.shuffle(values)
    return {value: itertools.cycle(values) for value, values in sorted(groups.items())}
