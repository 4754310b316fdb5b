"""The values that a sweep tries, checked before anything is loaded. Imports no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.common.errors import RecipeError, option
from finetune.recipe.explain import set_text
from finetune.recipe.load import Recipe, RecipeLike, as_recipe, refuse_missing_packages

BETWEEN = re.compile(r",(?![^\[{]*[\]}])")  # a comma that stands in no list or mapping
RANGE = re.compile(r"(?P<low>[-+0-9.eE]+)\.\.(?P<high>[-+0-9.eE]+)")


@dataclass(frozen=True)
class SweepChoice:
    """The values, as text, that a sweep tries for one key; of a range the lowest and the highest."""

    key: str
    values: tuple[str, ...]
    is_range: bool = False


def read_choices(
    recipe: RecipeLike, over: Sequence[str], trials: int | None, overrides: Sequence[str]
) -> tuple[list[SweepChoice], Recipe]:
    """The choices of `--over`, and the recipe with the first value of each. Raises RecipeError for a wrong recipe, key
    or value, each value being tried once.
    """
    own = as_recipe(recipe, overrides)
    refuse_missing_packages(own)  # its own problems first
    choices = [read_choice(text, ranges=trials is not None) for text in over]
    first = varied(recipe, overrides, [f"{choice.key}={choice.values[0]}" for choice in choices])
    if first.train.validation is None:
        where = own.name if isinstance(recipe, Recipe) else recipe
        raise RecipeError(f"{where}: trials are compared on validation rows: write train.validation, and rows for it")
    for values in corners(choices):
        varied(recipe, overrides, values)
    return choices, first


def read_choice(text: str, ranges: bool) -> SweepChoice:
    """`text`: one --over. Raises RecipeError."""
    key, equals, written = text.partition("=")
    values = [value.strip() for value in BETWEEN.split(written)]
    if not equals or not key or not all(values):
        raise RecipeError(f"{over_text(text)}: write key=value1,value2" + (", or key=low..high" if ranges else ""))
    bounds = RANGE.fullmatch(values[0]) if len(values) == 1 else None
    if bounds is None:
        return SweepChoice(key, tuple(dict.fromkeys(values)))
    if not ranges:
        raise RecipeError(
            f"{over_text(text)}: a range has no end of values; say how many with {option('--trials', 'trials=')}"
        )
    try:
        low, high = float(bounds["low"]), float(bounds["high"])
    except ValueError:
        raise RecipeError(f"{over_text(text)}: {written!r} isn't a range of numbers") from None
    if not low < high:
        raise RecipeError(f"{over_text(text)}: the low end comes first, and is smaller")
    return SweepChoice(key, (bounds["low"], bounds["high"]), is_range=True)


def over_text(key: str) -> str:
    return option(f"--over {key}", f"over: {key}")


def varied(recipe: RecipeLike, overrides: Sequence[str], values: Sequence[str]) -> Recipe:
    """The recipe with these values. Raises RecipeError, which names their keys as --over."""
    try:
        return as_recipe(recipe, [*overrides, *values])
    except RecipeError as error:
        message = str(error)
        for value in values:
            key = value.partition("=")[0]
            message = message.replace(f"{set_text(key)}: ", f"{over_text(key)}: ")
        raise RecipeError(message) from None


def corners(choices: Sequence[SweepChoice]) -> list[list[str]]:
    """Each value once, beside the first of all others: what can be checked before anything trains."""
    firsts = [f"{choice.key}={choice.values[0]}" for choice in choices]
    return [
        [*firsts[:number], f"{choice.key}={value}", *firsts[number + 1 :]]
        for number, choice in enumerate(choices)
        for value in choice.values
    ]
