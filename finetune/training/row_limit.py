"""Training rows of more tokens than a packed row holds, with all answers that an objective puts beside a question.
Imports no torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from finetune.common.errors import DataError
from finetune.data.rows import error_list
from finetune.data.sample import Sample
from finetune.recipe.load import Recipe
from finetune.recipe.parts import Needs, ObjectivePart
from finetune.training.lengths import Counter, Estimate, counted
from finetune.training.steps import samples_of


def too_long(where: str, lengths: Mapping[str, int], limit: int, objective: ObjectivePart | None = None) -> str | None:
    """Why a packed row of `limit` tokens doesn't hold the samples of a row, and what to change; None where it does.
    `lengths`: tokens of each sample, by its role; of the question alone where the objective samples answers to it.
    """
    tokens = sum(lengths.values())
    if objective is not None and objective.samples_answers:
        tokens = objective.tokens_of(tokens)
    if tokens <= limit:
        return None
    much = f"{tokens} tokens, more than a row holds: raise train.tokens_per_batch (now {limit})"
    if objective is not None and objective.samples_answers:
        options: Any = objective.options
        answers = f"{options.answers} answers of up to {options.max_new_tokens}"
        return f"{where}: the question and {answers} have {much}, or lower the objective's answers or max_new_tokens"
    if len(lengths) > 1:
        answers = f"the {' and the '.join(lengths)} answer with their question"
        return f"{where}: {answers} have {much} or shorten them; a medium is never cut"
    return f"{where}: {much} or shorten it; a medium is never cut"


def refuse_too_long(recipe: Recipe, samples: Sequence[Sample], estimated: Estimate) -> Iterator[str]:
    """Yields a warning where training samples are likely too long for a packed row, and raises DataError where some are
    for certain, as training does: by the tokenizer's and the encoders' files. Of many samples some are counted, with
    those that are likely the longest. `recipe`: without `auto` in tokens_per_batch.
    """
    objectives = [stage.objective for stage in recipe.train.stages]
    limit = int(recipe.train.tokens_per_batch)
    if estimated.longest <= limit and all(one.needs in ("answers", "teacher") for one in objectives):
        return
    counter, numbers = Counter.of(recipe.model, recipe.media), counted(samples)
    if any(one.needs == "pairs" for one in objectives):
        numbers |= counted([sample.answered(sample.rejected or "") for sample in samples])
    places = _Places(recipe, samples)
    certain: list[str] = []
    likely: list[str] = []
    for number in sorted(numbers):
        for together, objective in places.of(number):
            counts = {role: counter.tokens(one.messages) for role, one in together.items()}
            usual, least = (
                too_long(
                    samples[number].where,
                    {role: getattr(count, name) for role, count in counts.items()},
                    limit,
                    objective,
                )
                for name in ("usual", "least")
            )
            if usual:
                (certain if least else likely).append(usual)
                break
    rows = f"of {len(numbers):,} training rows" + (" that were counted" if len(numbers) < len(samples) else "")
    if certain:
        raise DataError(error_list(certain, f"{len(certain):,} {rows} can't be used"))
    if likely:
        yield f"{len(likely):,} {rows} are likely too long, and the run would refuse them, such as {likely[0]}"


class _Places:
    """What has to fit a packed row: each sample by itself, and what the objectives of its stages put together."""

    def __init__(self, recipe: Recipe, samples: Sequence[Sample]) -> None:
        self.recipe, self.samples = recipe, samples
        self.stages: list[tuple[ObjectivePart, dict[int, int]]] = []  # {sample: the one before it in the stage}
        for stage in recipe.train.stages:
            chosen = samples_of(stage, samples)
            self.stages.append((stage.objective, dict(zip(chosen, [*chosen[-1:], *chosen[:-1]], strict=True))))

    def of(self, number: int) -> Iterator[tuple[dict[str, Sample], ObjectivePart | None]]:
        """{role: sample} of each; with a question alone, the objective that samples answers to it."""
        sample = self.samples[number]
        question = replace(sample, messages=sample.question)
        yield {"": question if self.recipe.data[sample.source].head.trained else sample}, None
        for objective, before in self.stages:
            if number not in before:
                continue
            if objective.needs == "texts":
                words, options = sample.in_words(), objective.options
                own = getattr(options, "answers", "given") == "given"
                yield {"": words if own else replace(words, messages=words.question)}, None
            elif objective.compares:
                other = self.samples[before[number]].answer if objective.needs == "unpaired" else ""
                yield answers_by_role(sample, objective.needs, other), None
            elif objective.needs == "prompts":
                yield {"": question}, objective


def answers_by_role(sample: Sample, needs: Needs, other: str) -> dict[str, Sample]:
    """The answers to one question that an objective compares in a packed row. `other`: that of another row, to which
    single answers are compared.
    """
    if needs == "pairs":
        return {"chosen": sample, "rejected": sample.answered(sample.rejected or "")}
    return {"desirable" if sample.desirable else "undesirable": sample, "other": sample.answered(other)}
