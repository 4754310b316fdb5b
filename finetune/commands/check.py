"""Check a recipe and its rows, without loading a model. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data.rows import read_splits, summary
from finetune.data.sources import sources_of
from finetune.recipe.load import load_recipe


def check(recipe: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe and its rows, and check that their media exist. Returns counts per split.

    Raises RecipeError, DataError.
    """
    loaded = load_recipe(recipe, overrides)
    return {"name": loaded.name, **summary(read_splits(sources_of(loaded), loaded.seed))}
