"""What a stage needs whose answers vLLM samples. Imports no torch, but for a base."""

import os
from collections.abc import Iterator
from inspect import signature

from finetune.common.errors import RecipeError
from finetune.export._contract import EngineMissing
from finetune.export._vllm import environment
from finetune.recipe.schema import RecipeSections


def refuse_missing_sampler(recipe: RecipeSections) -> None:
    """Raises RecipeError where vLLM is missing, or one training has several processes."""
    for where in _sampled_by_vllm(recipe):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RecipeError(f"{where}: vllm is for a training of one process; leave it out, or launch one")
        try:
            environment.version_of(environment.find_python(None), plugin=False)
        except EngineMissing as error:
            raise RecipeError(f"{where}: {error}") from None


def refuse_unplain_base(recipe: RecipeSections) -> None:
    """Raises RecipeError for a base that needs more than embeddings, which is all that vLLM is given; ModelError where
    it can't be read.
    """
    base = recipe.model.base
    for where in _sampled_by_vllm(recipe):
        if base is None:
            continue
        import torch

        from finetune.export._vllm.language_model import text_class
        from finetune.model.base.both_ways import both_ways_of
        from finetune.model.base.existing import ExistingModel

        existing = ExistingModel.load(base, torch.float32, torch.device("cpu"))
        skeleton, reason = existing.skeleton, ""
        if existing.rope is not None:
            reason = "its positions have three dimensions"
        elif both_ways_of(skeleton) is not None:
            reason = "its attention goes both ways in places"
        elif "deepstack_visual_embeds" in signature(skeleton.get_decoder().forward).parameters:
            reason = "it reads features of several depths"
        elif text_class(existing.config) is None:
            reason = "transformers has no class for its language model alone"
        if reason:
            raise RecipeError(
                f"{where}: vllm samples from embeddings alone, and {base.name!r} needs more: {reason}; leave it out"
            )


def _sampled_by_vllm(recipe: RecipeSections) -> Iterator[str]:
    for number, stage in enumerate(recipe.train.stages):
        if stage.objective.sampled_by_vllm:
            yield f"train.stages.{number}.objective.sampler"
