"""What a file of `workloads/` consists of, and the pictures and words that they all draw from."""

import csv
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EMOJI = ROOT / "recipes/data/emoji"
FOLDER = Path(__file__).parent / "workloads"


@dataclass(frozen=True)
class Emoji:
    """A row of the emoji table: a picture with its names and groups."""

    image: str
    label: str
    label_en: str
    name_zh: str
    name_en: str
    subgroup: str


@dataclass(frozen=True)
class Conversation:
    """A training row: turns of a question and an answer, all of which are learned. `image` stands before the first;
    `rejected`: a worse answer than the last.
    """

    image: str | None
    turns: Sequence[tuple[str, str]]
    rejected: str | None = None


@dataclass(frozen=True)
class Workload:
    """`rows(emoji, questions, generator)`: conversations of so many emoji, in random order.

    `pictures`, `epochs`, `tokens_per_batch` and `pixels` are defaults; `vision`: the shape of a SigLIP with random
    weights that takes the encoder's place; `runs`: of each round, beside ours and the usual peers; `media`: whether
    there are pictures; `variants`: whether the peer has one that scores learned positions only; `settings`: options of
    the objective; `reward`: of a sampled answer.
    """

    rows: Callable[[Sequence[Emoji], int, random.Random], list[Conversation]]
    pictures: int
    epochs: int = 3
    tokens_per_batch: int = 512
    pixels: int | None = None
    media: bool = True
    vision: dict[str, Any] | None = None
    runs: tuple[str, ...] = ()
    objective: str = "next_token"
    variants: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    reward: Callable[[str], float] | None = None


def names() -> list[str]:
    return sorted(path.stem.replace("_", "-") for path in FOLDER.glob("[a-z]*.py"))


def workload(name: str) -> Workload:
    module = import_module(f"benchmarks.train_vs_trl.workloads.{name.replace('-', '_')}")
    found: Workload = module.WORKLOAD
    return found


def emoji(count: int, seed: int) -> list[Emoji]:
    """So many of the table's pictures, with absolute paths. Raises SystemExit where it has fewer."""
    with (EMOJI / "train.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    if count > len(rows):
        raise SystemExit(f"{count} pictures asked for, {len(rows)} in {EMOJI / 'train.csv'}")
    chosen = random.Random(seed).sample(rows, count)
    return [Emoji(**{**row, "image": str(EMOJI / row["image"])}) for row in chosen]
