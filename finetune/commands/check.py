"""Check a recipe and its rows, without loading a model. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.common import display
from finetune.data.rows import SplitSummary, read_splits, summary
from finetune.recipe.load import Recipe, RecipeLike, as_recipe, refuse_missing_trackers


@dataclass(frozen=True, repr=False)
class CheckedRecipe:
    """A recipe that can be trained. `splits`: {split: counts of its rows, media and answers}."""

    recipe: Recipe
    splits: dict[str, SplitSummary]

    def __str__(self) -> str:
        lines = [
            f"  {split}: {count.rows:,} rows, {count.media:,} media, {count.different_answers:,} answers"
            for split, count in self.splits.items()
            if count.rows
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"{self.recipe.name}: OK\n{self}"

    def _repr_html_(self) -> str:
        return display.preformatted(repr(self))


def check(recipe: RecipeLike, overrides: Sequence[str] = ()) -> CheckedRecipe:
    """Read a recipe and its rows, and check that their media exist.

    Raises RecipeError, DataError.
    """
    loaded = as_recipe(recipe, overrides)
    refuse_missing_trackers(loaded)
    return CheckedRecipe(loaded, summary(read_splits(loaded.data, loaded.seed, loaded.media.max_bytes)))
