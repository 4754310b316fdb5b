"""Optimizer steps of the stages, counted before they train. Imports no torch."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from finetune.data.rows import picked, sampling_weights, sources_of
from finetune.data.sample import Sample
from finetune.recipe.schema import Stage, Train
from finetune.training.pack import plan_rows

FEW_STEPS = 50
SMALLEST_BATCH = 128  # tokens
# What `auto` aims at, and its bounds.
ALL_STEPS = 100  # of all stages
EPOCH_STEPS = 20  # of an epoch, where the number of epochs is free
MOST_EPOCHS = 30
LARGEST_BATCH = 2048  # tokens
LEAST_TOKENS = 16  # the recipe's own bound


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


def samples_of(stage: Stage, samples: Sequence[Sample]) -> "array[int]":
    """Numbers of the training samples that a stage uses."""
    sources = enumerate(sources_of(samples))
    return array("q", (i for i, source in sources if not stage.sources or source in stage.sources))


def steps_of(train: Train, samples: Sequence[Sample], lengths: Sequence[int]) -> tuple[StageSteps, ...]:
    """The steps of each stage. `lengths`: tokens of each sample; one longer than a row counts as a row."""
    stages = []
    for stage in train.stages:
        chosen = samples_of(stage, samples)
        weights = sampling_weights(picked(samples, chosen), train.mixing_temperature) if chosen else []
        capacity = int(train.tokens_per_batch)
        apart = [min(stage.objective.tokens_of(lengths[i]), capacity) for i in chosen]
        rows = plan_rows(apart, weights, capacity=capacity, epochs=1, seed=0)
        steps = stage.objective.iterations * len(rows) / train.accumulate
        stages.append(StageSteps(stage.name, len(chosen), int(stage.epochs), steps))
    return tuple(stages)


def more_steps(train: Train, samples: Sequence[Sample], lengths: Sequence[int], longest: int) -> Train:
    """The same with `tokens_per_batch`, then `accumulate`, lowered and epochs raised until each stage has FEW_STEPS
    steps. `longest`: tokens of the longest sample, which a row holds at least.
    """
    smallest = max(SMALLEST_BATCH, _power_of_two(longest))
    while _fewest(train, samples, lengths) < FEW_STEPS and int(train.tokens_per_batch) // 2 >= smallest:
        train = train.model_copy(update={"tokens_per_batch": int(train.tokens_per_batch) // 2})
    if _fewest(train, samples, lengths) < FEW_STEPS and train.accumulate > 1:
        train = train.model_copy(update={"accumulate": 1})
    stages = [
        stage.model_copy(update={"epochs": max(int(stage.epochs), ceil(FEW_STEPS / (count.per_epoch or 1)))})
        for stage, count in zip(train.stages, steps_of(train, samples, lengths), strict=True)
    ]
    return train.model_copy(update={"stages": stages})


@dataclass(frozen=True)
class Numbers:
    """`train` without `auto` in tokens_per_batch and epochs; `reasons`: a line for each number in its place."""

    train: Train
    reasons: tuple[str, ...]


def has_auto(train: Train) -> bool:
    """Whether tokens_per_batch or epochs of a stage is `auto`."""
    return train.tokens_per_batch == "auto" or any(stage.epochs == "auto" for stage in train.stages)


def numbers(
    train: Train, samples: Sequence[Sample], lengths: Sequence[int], longest: int, most: int = LARGEST_BATCH
) -> Numbers:
    """Numbers for `auto`: the most tokens_per_batch with which an epoch has EPOCH_STEPS, or fixed epochs have FEW_STEPS
    in each stage and ALL_STEPS in all; then the fewest epochs with these steps, at most MOST_EPOCHS.

    `longest`: tokens of the longest sample, which a row holds at least; `most`: tokens that the GPU's memory allows.
    """
    reasons = []
    free = [stage.epochs == "auto" for stage in train.stages]
    once = [stage.model_copy(update={"epochs": 1}) if stage.epochs == "auto" else stage for stage in train.stages]
    chosen = train.model_copy(update={"stages": once})
    if train.tokens_per_batch == "auto":
        tokens, why = _tokens(chosen, free, samples, lengths, longest, most)
        chosen = _with_tokens(chosen, tokens)
        few = min(steps_of(chosen, samples, lengths), key=lambda count: count.per_epoch)
        reasons.append(
            f"tokens_per_batch: {tokens}, {why} an epoch of {few.rows:,} rows has {few.per_epoch:,.0f} steps"
        )
    counts = steps_of(chosen, samples, lengths)
    fixed = sum(count.steps for count, automatic in zip(counts, free, strict=True) if not automatic)
    stages = []
    for stage, count, automatic in zip(chosen.stages, counts, free, strict=True):
        if automatic:
            steps = max(FEW_STEPS, ceil((ALL_STEPS - fixed) / sum(free)))
            epochs = min(ceil(steps / count.per_epoch), MOST_EPOCHS) if count.per_epoch else MOST_EPOCHS
            stage, count = stage.model_copy(update={"epochs": epochs}), replace(count, epochs=epochs)
            why = "so that" if count.steps >= steps else "the most that auto takes:"
            reasons.append(
                f"epochs: {epochs} in stage {stage.name}, {why} its {count.rows:,} rows give {count.steps:,} steps"
            )
        stages.append(stage)
    return Numbers(chosen.model_copy(update={"stages": stages}), tuple(reasons))


def _tokens(
    train: Train, free: Sequence[bool], samples: Sequence[Sample], lengths: Sequence[int], longest: int, most: int
) -> tuple[int, str]:
    """tokens_per_batch, and why it isn't another number. `free`: of each stage, whether its epochs are `auto`."""
    least = max(_power_of_two(longest), LEAST_TOKENS)
    tokens = max(most, least)

    def enough() -> bool:
        counts = steps_of(_with_tokens(train, tokens), samples, lengths)
        if not any(free) and sum(count.steps for count in counts) < ALL_STEPS:
            return False
        return all(
            count.per_epoch >= EPOCH_STEPS if automatic else count.steps >= FEW_STEPS
            for count, automatic in zip(counts, free, strict=True)
        )

    while not enough() and tokens // 2 >= least:
        tokens //= 2
    if tokens == least and (least >= most or not enough()):
        return tokens, f"the least that holds the longest row (about {longest:,} tokens):"
    if tokens == most:
        return tokens, f"the most that {'auto takes' if most == LARGEST_BATCH else 'the GPU has memory for'}:"
    return tokens, "so that"


def _with_tokens(train: Train, tokens: int) -> Train:
    return train.model_copy(update={"tokens_per_batch": tokens})


def _fewest(train: Train, samples: Sequence[Sample], lengths: Sequence[int]) -> int:
    return min(count.steps for count in steps_of(train, samples, lengths))


def _power_of_two(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
