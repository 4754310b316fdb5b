"""Plan a run from its recipe file. Imports torch only once the recipe is known to be right."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.recipe.load import load_recipe
from finetune.training.plan.cards import card_named

if TYPE_CHECKING:
    from finetune.training.plan.plan import Plan


def plan(
    recipe: Path | str, overrides: Sequence[str] = (), gpu: str | None = None, rent: float | None = None
) -> "Plan":
    """See `finetune.training.plan.plan.plan`. Raises RecipeError, DataError, ModelError."""
    loaded = load_recipe(recipe, overrides)
    if gpu is not None:
        card_named(gpu)
    from finetune.training.plan.plan import plan

    return plan(loaded, gpu, rent=rent)
