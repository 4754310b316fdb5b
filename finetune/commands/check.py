"""Check a recipe and its rows, without loading a model. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path

from finetune.data.rows import SplitSummary, read_splits, summary
from finetune.recipe.load import load_recipe, refuse_missing_trackers


def check(recipe: Path | str, overrides: Sequence[str] = ()) -> dict[str, SplitSummary]:
    """Read a recipe and its rows, and check that their media exist. Returns {split: counts}.

    Raises RecipeError, DataError.
    """
    loaded = load_recipe(recipe, overrides)
    refuse_missing_trackers(loaded)
    return summary(read_splits(loaded.data, loaded.seed, loaded.media.max_bytes))
