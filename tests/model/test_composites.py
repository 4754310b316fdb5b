"""Encoders, projectors and fusions in pairs: the planned placeholders are those that come, whatever the medium."""

from functools import lru_cache
from itertools import product
from math import isqrt

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import FUSIONS, fresh_tokenizer, part, tiny_llm
from tiny_encoders import KINDS, medium_of, tiny_clip, tiny_encoder_of, tiny_sound

from finetune.common.errors import ModelError
from finetune.common.registry import load_part, part_names
from finetune.data.sample import Medium, Message
from finetune.model.compose import compose
from finetune.model.composition import PLACEHOLDERS
from finetune.model.features import encode_one
from finetune.model.tokenize import add_placeholders, tokenize_prompt

pytestmark = pytest.mark.slow

ODD = {
    "image": [PIL.Image.new("RGB", size, (9, 120, 200)) for size in ((37, 53), (5, 250), (250, 5), (1, 1))],
    "audio": [tiny_sound(0.1), tiny_sound(1.37), 0 * tiny_sound(0.5), tiny_sound(11)],
    "video": [tiny_clip(1), tiny_clip(3), tiny_clip(7, size=(50, 1))],
}
SMALL = {"resampler": {"queries": 3}, "pixel_shuffle": {"factor": 2}, "conv": {}, "stack": {"factor": 4}}
OPTIONS = {"wave": {"window_seconds": 5.0}, "whisper": {"window_seconds": 5.0}, "vision": {}, "video": {}}


PROJECTORS, FUSION = part_names("projectors"), part_names("fusion")
# Every encoder with every projector; the fusions take turns, so that each meets each of the others.
CASES = [
    (label, projector, FUSION[(row + column) % len(FUSION)])
    for row, label in enumerate(KINDS)
    for column, projector in enumerate(PROJECTORS)
]


def test_every_pair_of_parts_is_a_case():
    parts = (KINDS, PROJECTORS, FUSION)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert {(case[one], case[other]) for case in CASES} == set(product(parts[one], parts[other]))


@lru_cache(maxsize=1)  # cases of an encoder follow one another
def encoded(label):
    """An encoder of this label, its odd media as it prepares them, and their features."""
    encoder = tiny_encoder_of(label, **OPTIONS.get(KINDS[label][0], {}))
    prepared = [encoder.prepare(decoded) for decoded in ODD[medium_of(label)]]
    return encoder, prepared, [encode_one(encoder, one) for one in prepared]


def refuses(projector, prepared) -> bool:
    """Only pixel_shuffle does: it takes square grids of an even side."""
    sizes = {one.layout.rows for one in prepared}
    return projector == "pixel_shuffle" and any(isqrt(rows) ** 2 != rows or isqrt(rows) % 2 for rows in sizes)


def test_some_encoders_are_refused_and_others_are_not():
    refused = {label for label in KINDS if refuses("pixel_shuffle", encoded(label)[1])}
    assert {"siglip", "dinov2_registers", "vjepa2"}.isdisjoint(refused) and {"whisper", "wav2vec2", "ast"} <= refused


@pytest.mark.parametrize("label, projector, fusion", CASES)
def test_placeholders_are_the_rows_that_come(label, projector, fusion):
    medium = medium_of(label)
    encoder, prepared, features = encoded(label)
    tokenizer = fresh_tokenizer()
    placeholders = add_placeholders(tokenizer, [medium], PLACEHOLDERS)
    llm = tiny_llm(vocabulary=len(tokenizer))

    def build():
        return compose(
            llm,
            encoders={medium: encoder},
            projectors={medium: part("projectors", projector, **SMALL.get(projector, {}))},
            fusion=part("fusion", fusion, **FUSIONS.get(fusion, {})),
            placeholder_ids={medium: placeholders[medium].id},
        ).eval()

    if refuses(projector, prepared):  # before anything runs
        with pytest.raises(ModelError, match=r"pixel_shuffle: \d+ rows"):
            placement = build().composition.placement
            [placement.segments(medium, one.layout) for one in prepared]
        return
    model = build()
    planned = [model.composition.placement.segments(medium, one.layout) for one in prepared]
    for one, rows, segments in zip(prepared, features, planned, strict=True):
        assert rows.shape == (len(one.layout.marks), one.layout.rows, encoder.width)
        projected, lengths = model.project(medium, [rows])
        assert len(projected) == sum(lengths) and len(lengths) == len(segments)
        assert [load_part("fusion", fusion).placeholders(n, None) for n in lengths] == [n for _, n in segments]
        assert torch.isfinite(projected).all()
    # All of them in one conversation, text in between.
    question = [part for number in range(len(planned)) for part in (f"What is {number}?", _medium(medium, number))]
    prompt = tokenize_prompt(
        [Message("user", (*question, "Say."))], tokenizer, placeholders, lambda m: planned[int(m.path)]
    )
    ids = torch.tensor([prompt.input_ids])
    assert (ids == placeholders[medium].id).sum() == sum(count for segments in planned for _, count in segments)
    with torch.no_grad():
        cached = model(ids, features={medium: features}).logits
        raw = model(ids, media={medium: [one.values for one in prepared]}).logits
    assert torch.isfinite(cached).all() and torch.equal(cached, raw)


@pytest.mark.parametrize("label", ["whisper", "wav2vec2", "ast", "clap"])
def test_ten_minutes_of_sound_take_the_placeholders_that_were_planned(label):
    encoder = tiny_encoder_of(label)
    prepared = encoder.prepare(np.tile(tiny_sound(10), 60))
    features = encode_one(encoder, prepared)
    windows, rows, _ = features.shape
    assert (windows, rows) == (len(prepared.layout.marks), prepared.layout.rows)
    if label in ("whisper", "wav2vec2"):  # rows of 20 ms
        assert 599 < 0.02 * windows * rows < 602
    for fusion in FUSION:
        model = compose(
            tiny_llm(),
            encoders={"audio": encoder},
            projectors={"audio": part("projectors", "stack", factor=8)},
            fusion=part("fusion", fusion, **FUSIONS.get(fusion, {})),
            placeholder_ids={"audio": 130},
        )
        planned = model.composition.placement.segments("audio", prepared.layout)
        projected, lengths = model.project("audio", [features])
        assert len(projected) == sum(lengths) == windows * -(-rows // 8)
        assert [load_part("fusion", fusion).placeholders(n, None) for n in lengths] == [n for _, n in planned]


class _Number:
    """A medium's path that is its number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __int__(self) -> int:
        return self.number


def _medium(kind: str, number: int) -> Medium:
    return Medium(kind, _Number(number))  # type: ignore[arg-type]
