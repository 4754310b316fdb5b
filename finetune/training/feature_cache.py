"""Encode what the feature cache lacks, once."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from finetune.common.errors import DataError
from finetune.common.progress import bar, console
from finetune.data.rows import listed
from finetune.model.features import Features

TRIED = 8  # media encoded to tell how large the cache gets


def fill_cache(media: Sequence[Any], features: Features, epochs: int, encode_batch: int, workers: int) -> None:
    """Encode what the cache lacks. Says first how large it gets and from which epoch on it pays."""
    for kind, keys in features.missing(media).items():
        if not keys:
            console.print(f"features of {kind}: all in the cache ({features.stores[kind].folder})")
            continue
        tried, each = trial(features, kind, keys)
        size = sum(one.nbytes for one in tried) * len(keys) // len(tried)
        free = shutil.disk_usage(existing_parent(features.stores[kind].folder)).free
        console.print(
            f"features of {kind}: {len(keys):,} × about {tuple(tried[0].shape)} "
            f"{str(tried[0].dtype).removeprefix('torch.')} = {size / 2**20:,.0f} MiB on disk; encoded once in about "
            f"{each * len(keys):.0f} s, "
            f"without cache {each * len(keys) * epochs:.0f} s in {epochs} epochs: pays from the second epoch on"
        )
        if size > 0.9 * free:
            raise DataError(
                f"the features need {size / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free in "
                f"{features.stores[kind].folder}: set train.cache: false or train.cache_folder"
            )
        with bar(f"encode {kind}", len(keys)) as step:
            features.fill(kind, keys, step, encode_batch, workers)


def trial(features: Features, kind: str, keys: Sequence[str]) -> tuple[list[Any], float]:
    """Features of a few media that can be read, of one where all are alike, and the seconds that the encoder takes for
    one. Raises DataError where none can be read.
    """
    wanted = 1 if features.encoders[kind].layout is not None else TRIED
    prepared: list[Any] = []
    wrong: list[str] = []
    # Taken from all over the rows: files often lie sorted, by length too.
    for key in [*keys[:: max(1, len(keys) // wanted)], *keys]:
        if len(prepared) == wanted:
            break
        try:
            prepared.append(features.prepared(kind, key))
        except DataError as error:  # reported with all others when the cache is filled
            wrong.append(str(error))
    if not prepared:
        raise DataError(listed(list(dict.fromkeys(wrong)), f"none of {len(keys)} media of kind {kind} can be used"))
    features.compute(kind, prepared[:1])  # warms up
    begin = perf_counter()
    return features.compute(kind, prepared), (perf_counter() - begin) / len(prepared)


def existing_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
