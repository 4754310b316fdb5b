"""`auto` for tokens_per_batch and epochs, replaced by numbers that fit a recipe's rows. Imports no torch where a
tokenizer is at hand.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Any

from finetune.data.rows import read_splits, refuse_empty_splits, refuse_unfit
from finetune.data.sample import Sample
from finetune.recipe.load import Recipe
from finetune.training.lengths import Estimate, estimate, likely_longest
from finetune.training.steps import LARGEST_BATCH, Numbers, has_auto, numbers

ROOM = 1.1  # by which the longest row may be longer than estimated
NO_LIMIT = 2**30  # tokens


def numbers_at_hand(recipe: Recipe, samples: Sequence[Sample], estimated: Estimate | None) -> Numbers | None:
    """Numbers for a recipe's `auto`, as a run will choose them without a limit of memory; None where the files that
    tell how long its samples are aren't on this machine.
    """
    if not has_auto(recipe.train):
        return Numbers(recipe.train, ())
    if estimated is None or estimated.unknown:
        return None
    return numbers(recipe.train, samples, estimated.lengths, longest_row(recipe, samples, estimated))


class AutoNumbers:
    """Chooses numbers for a recipe's `auto`. Downloads the tokenizer and the encoders' configs where they tell how long
    the rows are and aren't at hand.
    """

    def __init__(self, recipe: Recipe, processes: int = 1) -> None:
        """`processes`: that share the packed rows of a step. Raises DataError, ModelError."""
        self.train, self.processes = recipe.train, processes
        splits = read_splits(recipe.data, recipe.seed, recipe.media.max_bytes, recipe.file)
        refuse_empty_splits(splits, recipe)
        refuse_unfit(splits, recipe)
        self.samples = splits.train
        estimated = estimate(recipe.model, self.samples, recipe.media)
        if estimated is None or estimated.unknown or estimated.by_characters:
            estimated = _tokenized(recipe, self.samples)
        self.lengths, self.longest = estimated.lengths, longest_row(recipe, self.samples, estimated)

    def choose(self, most: int = LARGEST_BATCH) -> Numbers:
        """`most`: tokens of a packed row that the GPU has memory for."""
        shared = self.train.model_copy(update={"accumulate": self.train.accumulate * self.processes})
        found = numbers(shared, self.samples, self.lengths, self.longest, most)
        return replace(found, train=found.train.model_copy(update={"accumulate": self.train.accumulate}))


def longest_row(recipe: Recipe, samples: Sequence[Sample], estimated: Estimate) -> int:
    """Tokens of the longest sample, or of what a stage that distills, compares or samples answers puts in its place."""
    longest = estimated.longest
    objectives = [stage.objective for stage in recipe.train.stages]
    distilling: list[Any] = [objective.options for objective in objectives if objective.needs == "texts"]
    if distilling and (words := estimate(recipe.model, [sample.in_words() for sample in samples], recipe.media)):
        longest = max(longest, words.longest)
        longest += max((one.max_new_tokens for one in distilling if one.answers == "own"), default=0)
    with_teacher: list[Any] = [objective.options for objective in objectives if objective.needs == "teacher"]
    longest = max(
        [longest, *(estimated.longest + int(one.max_new_tokens) for one in with_teacher if one.answers == "own")]
    )
    if any(objective.compares for objective in objectives):
        answers = [sample.answered(sample.rejected or sample.answer) for sample in samples]
        rejected = estimate(recipe.model, answers, recipe.media)
        longest += max(estimated.longest, rejected.longest if rejected else 0)
    longest = max([longest, *(one.tokens_of(estimated.longest) for one in objectives if one.samples_answers)])
    return ceil(ROOM * longest)


def _tokenized(recipe: Recipe, samples: Sequence[Sample]) -> Estimate:
    """Some samples and the likely longest, tokenized as training does; the others are taken to be as long."""
    from finetune.model.bindings import bindings_of
    from finetune.model.features import Features
    from finetune.training.plan.rows import PlannedRows, PlannedRun, evenly_of_sources
    from finetune.training.samples import tokenized

    some = evenly_of_sources(samples)
    planned = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tokens_per_batch": NO_LIMIT})})
    rows = PlannedRows(
        some, bindings_of(recipe.data, samples), Counter(sample.source for sample in samples), held_out=0, media={}
    )
    begun = PlannedRun(planned.with_dtype("float32"), rows)
    lengths = begun.samples.lengths
    exact = replace(begun.run, features=Features(begun.run.features.encoders, None, recipe.media))
    longest = [len(row.input_ids) for row in tokenized([samples[number] for number in likely_longest(samples)], exact)]
    return Estimate([lengths[number % len(lengths)] for number in range(len(samples))], max(*lengths, *longest), ())
