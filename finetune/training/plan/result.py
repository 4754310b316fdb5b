"""What a plan comes to: bytes of a card by phase and part, what makes it fit, disk, time, money. Imports no torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetune.common import display
from finetune.common.gpu import GIB
from finetune.training.plan.cards import SIZES, USABLE, Card

TIGHT = 0.9  # of a card
MIB = 2**20


@dataclass(frozen=True)
class Phase:
    """Bytes by part while a phase is at its fullest, and the operations of one row, medium or batch of it."""

    name: str
    parts: dict[str, int]
    flops: int = 0
    calls: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Change:
    """Keys of a recipe with the values that they would get, and what the run then takes of a card, in bytes, planned
    again with them.
    """

    keys: dict[str, Any]
    needed: int

    def __str__(self) -> str:
        return ", ".join(f"{key}: {value}" for key, value in self.keys.items())


@dataclass(frozen=True, repr=False)
class Plan:
    """What a run takes, in bytes and seconds. `checkpoints`: layers per activation checkpoint, in the place of `auto`,
    as `tokens_per_batch` is; `checkpoints_reason`: '' where the recipe has their number; `needed`: of the card, in its
    fullest phase; `changes`: each holds all keys of the one before; `disk`: {what: bytes}; `seconds`: {phase: seconds
    on `card`}.
    """

    name: str
    card: Card
    checkpoints: int
    checkpoints_reason: str
    tokens_per_batch: int
    dtype: str
    phases: tuple[Phase, ...]
    needed: int
    changes: tuple[Change, ...]
    memory_elsewhere: dict[str, int]
    disk: dict[str, int]
    seconds: dict[str, float]
    notes: tuple[str, ...]

    @property
    def exit_status(self) -> int:
        """0: fits; 1: tight, over 90% of the card; 2: doesn't fit."""
        return status(self.needed, self.card.memory * GIB)

    @property
    def dollars(self) -> float:
        return sum(self.seconds.values()) / 3600 * self.card.rent

    @property
    def fullest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    def fit(self, memory: float) -> Change | None:
        """The first of the recipe as it is and its changes that fits so many GiB; None where none does."""
        choices = (Change({}, self.needed), *self.changes)
        return next((choice for choice in choices if status(choice.needed, memory * GIB) < 2), None)

    def figures(self) -> dict[str, dict[str, float]]:
        """What metrics.json holds beside measured figures, with the same keys: peaks of torch's allocator, seconds."""
        memory = {"train_cuda": 0.0, "evaluate_cuda": 0.0}
        seconds = {"encode": 0.0, "llm": 0.0, "evaluate": 0.0}
        for phase in self.phases:
            what = phase.name.partition(" ")[0]
            peak = "evaluate_cuda" if what == "evaluate" else "train_cuda"
            memory[peak] = max(memory[peak], phase.total)
            seconds["llm" if what == "train" else what] += self.seconds[phase.name]
        return {"planned_memory_bytes": memory, "planned_seconds": seconds}

    def rows(self) -> list[tuple[str, ...]]:
        """Of a table with a column for each phase: its parts, their sum, its time."""
        return [
            *(
                (part, *(size(phase.parts[part]) if part in phase.parts else "" for phase in self.phases))
                for part in parts_of(self.phases)
            ),
            ("together", *(size(phase.total) for phase in self.phases)),
            ("time", *(duration(self.seconds[phase.name]) for phase in self.phases)),
        ]

    def line(self) -> str:
        verdict = ("fits", "is tight on", "doesn't fit")[self.exit_status]
        return (
            f"{self.name}: {self.needed / GIB:.1f} GiB, {verdict} {self.card.name} ({self.card.memory:.1f} GiB); about "
            f"{duration(sum(self.seconds.values()))} there, {self.dollars:.2f} US$; "
            f"{sum(self.disk.values()) / GIB:.1f} GiB of disk"
        )

    def as_json(self) -> dict[str, Any]:
        sizes = {f"{size} GB": self.fit(size * USABLE) for size in SIZES}
        return {
            **asdict(self),
            "fits": {name: None if change is None else change.keys for name, change in sizes.items()},
            "dollars": self.dollars,
            "exit_status": self.exit_status,
        }

    def __repr__(self) -> str:
        return self.line()

    def _repr_html_(self) -> str:
        return display.line(self.line()) + display.table(("", *(phase.name for phase in self.phases)), self.rows())


def status(needed: float, memory: float) -> int:
    return 2 if needed > memory else 1 if needed > TIGHT * memory else 0


def duration(seconds: float) -> str:
    """Seconds, to read."""
    if seconds < 60:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes, to read."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / MIB:.1f} MiB"


def parts_of(phases: Sequence[Phase]) -> list[str]:
    """The names of all parts: weights first."""
    last = ("gradients", "optimizer", "keys and values", "activations")
    found = list(dict.fromkeys(part for phase in phases for part in phase.parts))
    return [*(part for part in found if part not in last), *(part for part in last if part in found)]
