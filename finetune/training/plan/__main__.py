"""`python -m finetune.training.plan RECIPE [KEY=VALUE ...]`: a plan's line and figures as one line of JSON."""

import json
import sys

from finetune.recipe.load import load_recipe

if __name__ == "__main__":
    recipe = load_recipe(sys.argv[1], sys.argv[2:])  # so that a mistake is found before torch is imported
    from finetune.training.plan.plan import plan

    result = plan(recipe, advise=False)
    numbers = {"checkpoints": result.checkpoints, "tokens_per_batch": result.tokens_per_batch}
    text = {"line": result.line(), "checkpoints_reason": result.checkpoints_reason}
    print(json.dumps({**text, **numbers, **result.figures()}))
