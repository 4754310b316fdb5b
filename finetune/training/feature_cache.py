"""Encode what the feature cache lacks, once."""

from collections.abc import Sequence
from time import perf_counter

from torch import Tensor

from finetune.common.errors import DataError
from finetune.common.progress import bar, console
from finetune.data.rows import error_list
from finetune.data.sample import Medium, Prepared
from finetune.model.features import Features
from finetune.recipe.schema import Train
from finetune.training.cache_choice import FULLEST, free_bytes

ENCODED_FIRST = 8  # media encoded to estimate the size of the cache


def fill_cache(media: Sequence[Medium], features: Features, train: Train) -> None:
    """Encode what the cache lacks. Prints first how large it gets and from which epoch on it pays."""
    lacking = features.missing(media)
    for kind, store in features.stores.items():
        folder, missing = store.folder, lacking.get(kind)
        if not missing:
            console.print(f"features of {kind}: all in the cache ({folder})")
            continue
        first, seconds_each = first_features(features, missing)
        size = sum(tensor.nbytes for tensor in first) * len(missing) // len(first)
        seconds = seconds_each * len(missing)
        console.print(
            f"features of {kind}: {len(missing):,} × about {tuple(first[0].shape)} "
            f"{str(first[0].dtype).removeprefix('torch.')} = {size / 2**20:,.0f} MiB on disk; encoded once in about "
            f"{seconds:.0f} s, without cache {seconds * train.epochs:.0f} s in {train.epochs} epochs: pays from the "
            "second epoch on"
        )
        free = free_bytes(folder)
        if size > FULLEST * free:
            raise DataError(
                f"the features need {size / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free in "
                f"{folder}: set train.cache: false or train.cache_folder"
            )
        with bar(f"encode {kind}", len(missing)) as step:
            features.fill(missing, step, train.encode_batch, train.workers)


def first_features(features: Features, media: Sequence[Medium]) -> tuple[list[Tensor], float]:
    """(features of a few media, or of one where all have the same shape; seconds that the encoder takes for one).
    Raises DataError where none can be read.
    """
    kind = media[0].kind
    count = 1 if features.encoders[kind].layout is not None else ENCODED_FIRST
    prepared: list[Prepared] = []
    errors: list[str] = []
    # Taken from all over the rows: files are often sorted, by length too.
    for medium in [*media[:: max(1, len(media) // count)], *media]:
        if len(prepared) == count:
            break
        try:
            prepared.append(features.prepared(medium))
        except DataError as error:  # reported with all others when the cache is filled
            errors.append(str(error))
    if not prepared:
        headline = (
            f"none of the {len(media)} media of kind {kind} that have no features yet can be used; "
            "`finetune data check RECIPE --fix DIR` writes a copy of the rows without such media"
        )
        raise DataError(error_list(list(dict.fromkeys(errors)), headline))
    features.compute(kind, prepared[:1])  # warms up
    begin = perf_counter()
    return features.compute(kind, prepared), (perf_counter() - begin) / len(prepared)
