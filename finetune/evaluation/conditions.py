"""The media that a model is shown: their own, blank ones, or another row's."""

import hashlib
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from finetune.data.media import blank, decode
from finetune.data.rows import Entry
from finetune.data.sample import Medium
from finetune.evaluation.scores import look_of
from finetune.model.assistant import Look
from finetune.model.features import Features, encode_one

BLANKS_KEPT = 64


def same_as(condition: str, entry: Entry) -> str | None:
    """The condition in which the entry looks the same and was asked before; None where there is none."""
    kinds = {medium.kind for medium in entry.sample.media}
    if condition in ("base", "tuned"):
        return None
    if not kinds:
        return "tuned"
    blanked = condition.removeprefix("blank_")
    if blanked == condition:
        return None
    return "tuned" if blanked not in kinds else "blank" if kinds == {blanked} else None


def blank_look(features: Features, only: str | None = None) -> Look:
    """The encoder's view of empty media of the same size or length; `only` those of a kind."""
    true = look_of(features)
    seen: dict[str, Tensor] = {}

    def look(medium: Medium) -> Tensor:
        if only not in (None, medium.kind):
            return true.features(medium)
        encoder = features.encoders[medium.kind]
        where = features.where.get(features.key(medium), "")
        decoded = decode(medium.kind, medium.path, where=where, limits=features.limits, **encoder.sampling)
        prepared = encoder.prepare(blank(medium.kind, decoded))
        # Most blanks are alike: the same grey, the same silence.
        alike = hashlib.sha256(f"{medium.kind}{prepared.values.shape}".encode())
        alike.update(prepared.values.contiguous().numpy().data)
        if alike.hexdigest() not in seen:
            if len(seen) >= BLANKS_KEPT:  # recordings of many lengths
                seen.clear()
            seen[alike.hexdigest()] = encode_one(encoder, prepared).cpu()
        return seen[alike.hexdigest()]

    return Look(features.layout, look)


def shuffled_look(true: Look, media: Sequence[Medium], seed: int) -> Look:
    """Another row's medium in place of each: the media of a kind, moved around a shuffled circle."""
    other: dict[Medium, Medium] = {}
    kinds: dict[str, list[Medium]] = {}
    for medium in dict.fromkeys(media):
        kinds.setdefault(medium.kind, []).append(medium)
    for found in kinds.values():
        order = np.random.default_rng(seed).permutation(len(found))
        for left, right in zip(order, np.roll(order, 1), strict=True):
            other[found[left]] = found[right]
    return Look(lambda medium: true.layout(other[medium]), lambda medium: true.features(other[medium]))
