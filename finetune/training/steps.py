"""Optimizer steps of the stages, counted before they train. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from finetune.data.rows import sampling_weights
from finetune.data.sample import Sample
from finetune.recipe.schema import Stage, Train
from finetune.training.pack import plan_rows

FEW_STEPS = 50
SMALLEST_BATCH = 128  # tokens


@dataclass(frozen=True)
class StageSteps:
    """`steps`: about how many optimizer steps a stage takes on one device, of which each epoch has `per_epoch`."""

    stage: str
    rows: int
    epochs: int
    per_epoch: float

    @property
    def steps(self) -> int:
        return max(1, round(self.per_epoch * self.epochs))


def samples_of(stage: Stage, samples: Sequence[Sample]) -> list[int]:
    """Numbers of the training samples that a stage uses."""
    return [i for i, sample in enumerate(samples) if not stage.sources or sample.source in stage.sources]


def steps_of(train: Train, samples: Sequence[Sample], lengths: Sequence[int]) -> tuple[StageSteps, ...]:
    """The steps of each stage. `lengths`: tokens of each sample; one longer than a row counts as a row."""
    stages = []
    for stage in train.stages:
        chosen = samples_of(stage, samples)
        weights = sampling_weights([samples[i] for i in chosen], train.mixing_temperature) if chosen else []
        own = [min(lengths[i], train.tokens_per_batch) for i in chosen]
        rows = plan_rows(own, weights, capacity=train.tokens_per_batch, epochs=1, seed=0)
        stages.append(StageSteps(stage.name, len(chosen), stage.epochs, len(rows) / train.accumulate))
    return tuple(stages)


def more_steps(train: Train, samples: Sequence[Sample], lengths: Sequence[int]) -> Train:
    """The same with `tokens_per_batch`, then `accumulate`, lowered and epochs raised until each stage has FEW_STEPS
    steps.
    """
    smallest = max(SMALLEST_BATCH, _power_of_two(max(lengths)))
    while _fewest(train, samples, lengths) < FEW_STEPS and train.tokens_per_batch // 2 >= smallest:
        train = train.model_copy(update={"tokens_per_batch": train.tokens_per_batch // 2})
    if _fewest(train, samples, lengths) < FEW_STEPS and train.accumulate > 1:
        train = train.model_copy(update={"accumulate": 1})
    stages = [
        stage.model_copy(update={"epochs": max(stage.epochs, ceil(FEW_STEPS / count.per_epoch))})
        for stage, count in zip(train.stages, steps_of(train, samples, lengths), strict=True)
    ]
    return train.model_copy(update={"stages": stages})


def _fewest(train: Train, samples: Sequence[Sample], lengths: Sequence[int]) -> int:
    return min(count.steps for count in steps_of(train, samples, lengths))


def _power_of_two(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
