"""The conditions under which held-out rows are shown: their own media, blank ones, or another row's."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from finetune.data.media import blank
from finetune.data.sample import Layout, Medium, Sample, by_kind
from finetune.model.features import Features, MediaView, decode_for, encode_one

BLANKS_KEPT = 64


@dataclass(frozen=True)
class Condition:
    """`blanked`: the kinds of media that are blank."""

    name: str
    view: MediaView
    blanked: frozenset[str] = frozenset()

    def same_as(self, sample: Sample) -> str | None:
        """An earlier condition in which the sample looks the same; None where there is none."""
        kinds = {medium.kind for medium in sample.media}
        if self.name == "tuned":
            return None
        if not kinds:
            return "tuned"
        if not self.blanked or self.name == "blank":
            return None
        return "tuned" if not kinds & self.blanked else "blank" if kinds <= self.blanked else None


def conditions(features: Features, samples: Sequence[Sample], seed: int) -> list[Condition]:
    """tuned, blank and shuffled; where there are several kinds of media, one more with each of them blanked."""
    media = [medium for sample in samples for medium in sample.media]
    kinds = list(dict.fromkeys(medium.kind for medium in media))
    several = kinds if len(kinds) > 1 else []
    return [
        Condition("tuned", features),
        Condition("blank", BlankMedia(features, kinds), frozenset(kinds)),
        Condition("shuffled", ShuffledMedia(features, media, seed)),
        *(Condition(f"blank_{kind}", BlankMedia(features, [kind]), frozenset([kind])) for kind in several),
    ]


class BlankMedia:
    """Empty media of the same size or length in place of the `kinds`."""

    def __init__(self, features: Features, kinds: Sequence[str]) -> None:
        self._features, self._kinds = features, kinds
        self._blanks: dict[str, Tensor] = {}

    def layout(self, medium: Medium) -> Layout:
        return self._features.layout(medium)

    def features(self, medium: Medium) -> Tensor:
        if medium.kind not in self._kinds:
            return self._features.features(medium)
        encoder = self._features.encoders[medium.kind]
        decoded = decode_for(encoder, medium.kind, medium.path, self._features.limits, medium.place)
        prepared = encoder.prepare(blank(medium.kind, decoded))
        # Most blanks are alike: the same grey, the same silence.
        digest = hashlib.sha256(f"{medium.kind}{[tensor.shape for tensor in prepared.tensors]}".encode())
        for tensor in prepared.tensors:
            digest.update(tensor.contiguous().numpy().data)
        key = digest.hexdigest()
        if key not in self._blanks:
            if len(self._blanks) >= BLANKS_KEPT:  # recordings of many lengths
                self._blanks.clear()
            self._blanks[key] = encode_one(encoder, prepared).cpu()
        return self._blanks[key]


class ShuffledMedia:
    """Another row's medium in place of each: the media of a kind, moved around a shuffled circle."""

    def __init__(self, view: MediaView, media: Sequence[Medium], seed: int) -> None:
        self._view = view
        self._other: dict[Medium, Medium] = {}
        for same_kind in by_kind(dict.fromkeys(media)).values():
            order = np.random.default_rng(seed).permutation(len(same_kind))
            for left, right in zip(order, np.roll(order, 1), strict=True):
                self._other[same_kind[left]] = same_kind[right]

    def layout(self, medium: Medium) -> Layout:
        return self._view.layout(self._other[medium])

    def features(self, medium: Medium) -> Tensor:
        return self._view.features(self._other[medium])
