"""The stage's door: a recipe's sections as the plain values that stages work with."""

from pathlib import Path
from typing import Any

from finetune.data.media import Limits
from finetune.data.media_store import default_cache_folder
from finetune.data.rows import Source
from finetune.recipe.conflicts import source_names
from finetune.recipe.schema import Recipe


def sources_of(recipe: Recipe) -> list[Source]:
    """The recipe's sources, each under the name that its scores have."""
    names = source_names([(s.name, s.task.kind, s.task.options.model_dump_json()) for s in recipe.data])
    return [
        Source(
            path=source.path,
            task=(source.task.kind, source.task.options),
            format=(source.format.kind, source.format.options) if source.format else None,
            split=source.split,
            hold_out=source.hold_out,
            weight=source.weight,
            columns=source.columns,
            media_folder=source.media_folder,
            outside_media_folder=source.outside_media_folder,
            hosts=tuple(source.hosts),
            max_bytes=recipe.media.max_bytes,
            name=name,
            head=(source.head.kind, source.head.options),
            loss_weight=source.loss_weight,
            hold_out_validation=source.hold_out_validation,
            group=source.group,
        )
        for source, name in zip(recipe.data, names, strict=True)
    ]


def adapter_options(recipe: Recipe) -> dict[str, Any] | None:
    """Keywords of `adapter.attach`; None where the recipe has no adapter."""
    return recipe.adapter.model_dump() if recipe.adapter else None


def cache_folder(recipe: Recipe) -> Path | None:
    """Where features are kept; None where they aren't."""
    return (recipe.train.cache_folder or default_cache_folder()) if recipe.train.cache else None


def model_arguments(recipe: Recipe) -> dict[str, Any]:
    """Keywords of `assemble.load_parts`."""
    model = recipe.model
    return {
        "llm": model.llm.model_dump(),
        "encoders": {name: (part.kind, part.options) for name, part in model.encoders.items()},
        "projectors": {name: (part.kind, part.options) for name, part in model.projectors.items()},
        "fusion": (model.fusion.kind, model.fusion.options),
        "tune_encoders": {name: how.model_dump(exclude_none=True) for name, how in recipe.tune_encoders.items()},
    }


def limits_of(recipe: Recipe) -> Limits:
    return Limits(**recipe.media.model_dump())
