"""Encode what the feature cache lacks, once."""

import os
import shutil
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import get_start_method
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from finetune.common.console import IN_NOTEBOOK
from finetune.common.disk import free_bytes, writing
from finetune.common.errors import DataError
from finetune.common.progress import bar, console
from finetune.data.rows import error_list
from finetune.data.sample import Medium, Prepared
from finetune.model.features import Features, UnreadableMedia
from finetune.recipe.schema import Train
from finetune.training.cache_choice import FULLEST

ENCODED_FIRST = 8  # media encoded to estimate the size of the cache
MANY = 256  # media for which processes that decode, and batches that are tried first, pay
FEW_TOGETHER = 4  # in a batch; on a CPU more are slower
MOST_DECODERS = 16
HANDED_OVER = 3  # media of each decoding process that wait
LINE_SECONDS = 30.0


def fill_cache(media: Sequence[Medium], features: Features, train: Train) -> None:
    """Encode what the cache lacks. Prints first how large it gets and from which epoch on it pays. Raises
    UnreadableMedia, of all kinds, when the others are kept.
    """
    lacking = features.missing(media)
    found: list[UnreadableMedia] = []
    for kind, store in features.stores.items():
        if missing := lacking.get(kind):
            try:
                _fill(kind, missing, features, train)
            except UnreadableMedia as error:
                found.append(error)
        else:
            console.print(f"features of {kind}: all in the cache ({store.folder})")
    if found:
        reasons = {medium: reason for error in found for medium, reason in error.reasons.items()}
        raise UnreadableMedia("\n".join(map(str, found)), reasons)


def _fill(kind: str, missing: Sequence[Medium], features: Features, train: Train) -> None:
    folder = features.stores[kind].folder
    prepared = first_media(features, missing)
    first, seconds_each = first_features(features, kind, prepared)
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
    batch, workers = train.encode_batch, train.workers
    if len(missing) >= MANY:
        batch = batch if batch > 1 else equal_batch(features, kind, prepared)
        workers = workers or decoders(prepared)
    with bar(f"encode {kind}", len(missing)) as step, writing(folder, "the features"):
        features.fill(missing, Pace(kind, len(missing), step), batch, workers)


class Pace:
    """Says how many media a second are encoded; where no bar is seen, in a line now and then with the time left."""

    def __init__(self, kind: str, total: int, step: Callable[..., None]) -> None:
        self.kind, self.total, self.step = kind, total, step
        self.done, self.begin = 0, perf_counter()
        self.said = self.begin

    def __call__(self) -> None:
        self.done += 1
        now = perf_counter()
        pace = self.done / max(now - self.begin, 1e-9)
        self.step(f"{pace:,.0f}/s")
        if now - self.said >= LINE_SECONDS and not (console.is_terminal or IN_NOTEBOOK):
            self.said = now
            left = timedelta(seconds=round((self.total - self.done) / pace))
            console.print(f"  encode {self.kind}: {self.done:,} of {self.total:,}, {pace:,.0f}/s, {left} left")


def equal_batch(features: Features, kind: str, prepared: Sequence[Prepared]) -> int:
    """FEW_TOGETHER if so many media together have the features, to the bit, that each has alone; else 1."""
    shapes = [[tensor.shape for tensor in one.tensors] for one in prepared]
    alike = [one for one, shape in zip(prepared, shapes, strict=True) if shape == shapes[0]][:FEW_TOGETHER]
    alone, together = (features.compute(kind, alike, batch) for batch in (1, FEW_TOGETHER))
    equal = all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    return FEW_TOGETHER if equal and len(alike) == FEW_TOGETHER else 1


def decoders(prepared: Sequence[Prepared]) -> int:
    """As many processes as there are cores; none where what they hand over doesn't fit into shared memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    largest = max(sum(tensor.nbytes for tensor in one.tensors) for one in prepared)
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free if shared.is_dir() else 0
    forks = get_start_method() == "fork"  # others would load torch anew, and need all that they get pickled
    cores = min(cores, MOST_DECODERS)  # a container may have fewer than it shows
    return cores if forks and cores > 1 and 2 * HANDED_OVER * cores * largest < free else 0


def first_media(features: Features, media: Sequence[Medium]) -> list[Prepared]:
    """A few media, decoded and prepared. Raises UnreadableMedia where none can be read."""
    kind = media[0].kind
    count = 1 if len(media) < MANY and features.encoders[kind].layout is not None else ENCODED_FIRST
    prepared: list[Prepared] = []
    errors: list[str] = []
    reasons: dict[tuple[str, str], str] = {}
    # Taken from all over the rows: files are often sorted, by length too.
    for medium in [*media[:: max(1, len(media) // count)], *media]:
        if len(prepared) == count:
            break
        try:
            prepared.append(features.prepared(medium))
        except DataError as error:  # reported with all others when the cache is filled
            errors.append(str(error))
            reasons[kind, medium.key] = str(error).removeprefix(f"{medium.where}: ")
    if not prepared:
        headline = f"none of the {len(media)} media of kind {kind} that have no features yet can be used"
        raise UnreadableMedia(error_list(list(dict.fromkeys(errors)), headline), reasons)
    return prepared


def first_features(features: Features, kind: str, prepared: Sequence[Prepared]) -> tuple[list[Tensor], float]:
    """(features of a few media, or of one where all have the same shape; seconds that the encoder takes for one)."""
    if features.encoders[kind].layout is not None:
        prepared = prepared[:1]
    features.compute(kind, prepared[:1])  # warms up
    begin = perf_counter()
    return features.compute(kind, prepared), (perf_counter() - begin) / len(prepared)
