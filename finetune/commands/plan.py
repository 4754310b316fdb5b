"""Plan a run from its recipe file. Imports torch only once the recipe is known to be right."""

from collections.abc import Sequence

from finetune.recipe.load import RecipeLike, as_recipe
from finetune.training.plan.cards import card_named
from finetune.training.plan.result import Plan


def plan(recipe: RecipeLike, overrides: Sequence[str] = (), gpu: str | None = None, rent: float | None = None) -> Plan:
    """See `finetune.training.plan.plan.plan`. Raises RecipeError, DataError, ModelError."""
    loaded = as_recipe(recipe, overrides)
    if gpu is not None:
        card_named(gpu)
    from finetune.training.plan.plan import plan

    return plan(loaded, gpu, rent=rent)
