"""metrics.json: what training and evaluation leave in a run folder, as other code reads it.

Missing keys have defaults and unknown ones are ignored, so that an unfinished run, or one of another version, is
readable.
"""

import math
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

Value = float | None
ScoreTables = dict[str, dict[str, dict[str, Value]]]  # task -> metric -> condition -> value


class Result(BaseModel):
    model_config = ConfigDict(frozen=True)


class ValidationPass(Result):
    step: int = Field(description="Optimizer step of the stage.")
    score: float = Field(default=math.nan, description="Selection score, better when higher.")
    scores: dict[str, dict[str, Value]] = Field(default={}, description="Task -> metric -> value on validation rows.")
    good: list[float] = Field(default=[], description="How good each row's answer is, 0 to 1; [] if rows have groups.")


class StageResult(Result):
    losses: list[float] = Field(default=[], description="Of each optimizer step, in nats per answer token.")
    token_accuracy: list[float] = Field(default=[], description="Of each optimizer step: share of tokens predicted.")
    figures: dict[str, list[Value]] = Field(
        default={}, description="What else the objective reports of each optimizer step: name -> values."
    )
    steps: int = 0
    samples: int | None = Field(default=None, description="Rows trained on, counted once per epoch.")
    tokens: int | None = None
    left_out: int = Field(default=0, description="Rows left out since their loss wasn't finite: data/suspects.jsonl.")
    pieces: int = Field(
        default=1, description="In how many pieces packed rows were computed at last, as memory ran out otherwise."
    )
    warnings: list[str] = Field(default=[], description="What seemed wrong while it trained: data/warnings.jsonl.")
    seconds: float | None = Field(default=None, description="Of all parts of a stage that was resumed.")
    seconds_before: float = Field(default=0.0, description="Of these, before the last --resume.")
    trained_weights: dict[str, int] = Field(default={}, description="Component -> number of weights.")
    validation: list[ValidationPass] = []
    best_step: int | None = Field(default=None, description="Step whose weights were kept; null without validation.")


class TrainingResult(Result):
    stages: dict[str, StageResult] = {}
    rows: int | None = None
    tokens_per_epoch: int | None = None
    row_kind: str = Field("", description="How rows were laid out: padded, packed, segments, or with shared prefixes.")
    resumed: bool = Field(default=False, description="Whether energy counts only what followed the last --resume.")


class Confusion(Result):
    labels: list[str] = []
    counts: list[list[int]] = Field(
        [], description="Rows: true labels; columns: predicted ones, at last: none of them."
    )


class TaskTables(Result):
    confusion: Confusion | None = None
    per_label: dict[str, dict[str, int | float | None]] = Field(default={}, description="Label -> metric -> value.")


@dataclass(frozen=True)
class Comparison:
    """A score minus another of the same rows: of the trained model and under another condition, or of two trials.

    `low` and `high`: the 95% confidence interval, None with too few rows. `gained`, `lost`: rows that are right, or
    better, only in the first, or only in the second. `p`: of McNemar's exact test, or the sign test where rows or
    groups are too few for an interval; else None. `groups`: how many there are, where groups count and not rows.
    """

    difference: float
    low: Value = None
    high: Value = None
    gained: int = 0
    lost: int = 0
    p: Value = None
    groups: int = 0


class MergeOutcome(Result):
    refused: str | None = Field(default=None, description="Why the last merge was refused; null if it wasn't.")


class OtherRows(Result):
    path: str = Field(default="", description="File or folder of rows that the recipe doesn't name; '': its own rows.")
    trained_on: int = Field(default=0, description="How many of them are training rows too.")


class Metrics(Result):
    """metrics.json."""

    train: TrainingResult = TrainingResult()
    scores: ScoreTables = {}
    intervals: dict[str, dict[str, dict[str, tuple[float, float]]]] = Field(
        default={}, description="Task -> metric -> condition -> 95% confidence interval."
    )
    comparisons: dict[str, dict[str, dict[str, Comparison]]] = Field(
        default={}, description="Task -> metric -> condition that the trained model is compared with."
    )
    scored_rows: dict[str, int] = Field(default={}, description="Task -> number of held-out rows scored.")
    tables: dict[str, TaskTables] = {}
    data: OtherRows = OtherRows()
    merge: MergeOutcome = MergeOutcome()
    seconds: dict[str, float] = {}
    peak_memory_bytes: dict[str, float] = {}
    planned_seconds: dict[str, float] = Field(default={}, description="With the keys of `seconds`; {} without a GPU.")
    planned_memory_bytes: dict[str, float] = {}
    energy_joules: dict[str, float] = {}
