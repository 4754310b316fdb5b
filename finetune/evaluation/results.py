"""metrics.json: what training and evaluation leave in a run folder, as other code reads it.

Missing keys have defaults and unknown ones are ignored, so that an unfinished run, or one of another version, is
readable.
"""

import math

from pydantic import BaseModel, ConfigDict, Field

Value = float | None
ScoreTables = dict[str, dict[str, dict[str, Value]]]  # task -> metric -> condition -> value


class Result(BaseModel):
    model_config = ConfigDict(frozen=True)


class ValidationPass(Result):
    step: int = Field(description="Optimizer step of the stage.")
    score: float = Field(default=math.nan, description="Selection score, better when higher.")
    scores: dict[str, dict[str, Value]] = Field(default={}, description="Task -> metric -> value on validation rows.")


class StageResult(Result):
    losses: list[float] = Field(default=[], description="Of each optimizer step, in nats per answer token.")
    token_accuracy: list[float] = Field(default=[], description="Of each optimizer step: share of tokens predicted.")
    steps: int = 0
    samples: int | None = Field(default=None, description="Rows trained on, counted once per epoch.")
    tokens: int | None = None
    seconds: float | None = None
    trained_weights: dict[str, int] = Field(default={}, description="Component -> number of weights.")
    validation: list[ValidationPass] = []
    best_step: int | None = Field(default=None, description="Step whose weights were kept; null without validation.")


class TrainingResult(Result):
    stages: dict[str, StageResult] = {}
    rows: int | None = None
    tokens_per_epoch: int | None = None
    packed: bool = Field(default=False, description="Whether samples share rows without padding.")


class Confusion(Result):
    labels: list[str] = []
    counts: list[list[int]] = Field(
        [], description="Rows: true labels; columns: predicted ones, at last: none of them."
    )


class TaskTables(Result):
    confusion: Confusion | None = None
    per_label: dict[str, dict[str, int | float | None]] = Field(default={}, description="Label -> metric -> value.")


class Comparison(Result):
    """A score of the trained model minus the same under another condition, on the same rows."""

    difference: float
    low: Value = Field(default=None, description="95% confidence interval; null with too few rows.")
    high: Value = None
    gained: int = Field(default=0, description="Rows that are right, or better, only as trained.")
    lost: int = Field(default=0, description="Rows that are right, or better, only in the other.")
    p: Value = Field(default=None, description="Of McNemar's exact test; null where rows aren't simply right or wrong.")


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
    seconds: dict[str, float] = {}
    peak_memory_bytes: dict[str, float] = {}
    energy_joules: dict[str, float] = {}
