"""`auto` for train.cache: whether the features of frozen encoders are kept on disk. Imports no torch where the epochs
tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.common.disk import free_bytes
from finetune.data.sample import by_kind
from finetune.recipe.load import Recipe
from finetune.training.plan.result import size

if TYPE_CHECKING:
    from finetune.training.plan.rows import PlannedRows

FULLEST = 0.9  # share of the free disk that features may take


@dataclass(frozen=True)
class CacheChoice:
    """`reason`: a line for the console."""

    cache: bool
    reason: str

    def of(self, recipe: Recipe) -> Recipe:
        return recipe.model_copy(update={"train": recipe.train.model_copy(update={"cache": self.cache})})


def choice_at_hand(recipe: Recipe) -> CacheChoice | None:
    """None where only the disk tells. Numbers must be in the place of `auto` for epochs."""
    if recipe.tune_encoders:
        names = " and ".join(recipe.tune_encoders)
        return CacheChoice(False, f"cache: false, since the encoder of {names} trains")
    if recipe.trains_base_projectors:
        return CacheChoice(False, "cache: false, since the base's projectors train")
    if recipe.train.epochs == 1:
        return CacheChoice(False, "cache: false, since one epoch encodes each medium once anyway")
    return None


def choose_cache(recipe: Recipe, rows: "PlannedRows | None" = None) -> CacheChoice:
    """`rows`: what a plan knows of the recipe's, if they have been read. Reads the encoders' configs, no weights.
    Raises ModelError, DataError.
    """
    if (choice := choice_at_hand(recipe)) is not None:
        return choice
    folder = recipe.train.feature_folder
    assert folder is not None  # `auto` counts as true until it is replaced
    needed, free = sum(feature_bytes(recipe, rows)), free_bytes(folder)
    room = f"the features need {size(needed)}, and {size(free)} are free in {folder}"
    if needed > FULLEST * free:
        return CacheChoice(False, f"cache: false, since {room}")
    return CacheChoice(True, f"cache: true, since {recipe.train.epochs} epochs read what is encoded once; {room}")


def feature_bytes(recipe: Recipe, rows: "PlannedRows | None" = None) -> Sequence[int]:
    """Of the features of all training media, a number for each kind; some media are looked at."""
    from finetune.model.language_model import default_device, resolve_dtype
    from finetune.training.plan.rows import PlannedRows, PlannedRun

    rows = rows or PlannedRows.of(recipe)
    if not rows.media:
        return ()
    dtype = str(resolve_dtype(recipe.model.language_model.dtype, default_device())).removeprefix("torch.")
    planned = PlannedRun(recipe.with_dtype(dtype), rows)
    media = by_kind({medium: None for sample in rows.training for medium in sample.media})
    sizes = {kind: [planned.read(medium).nbytes for medium in own] for kind, own in media.items()}
    return [round(sum(found) / len(found)) * rows.media[kind] for kind, found in sizes.items()]
