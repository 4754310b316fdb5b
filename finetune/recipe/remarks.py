"""What a recipe leads to that its author may not expect, though nothing in it is wrong."""

from finetune.recipe.load import Recipe


def remarks(recipe: Recipe) -> list[str]:
    """A sentence each."""
    found = []
    if not recipe.trains_adapter:
        parts = ", ".join(dict.fromkeys(part for stage in recipe.train.stages for part in stage.trains))
        reason = "adapter is null" if recipe.adapter is None else "no stage trains the adapter"
        found.append(f"{reason}: the merged model is the LLM as it is, with the trained {parts}")
    return found
