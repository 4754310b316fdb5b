"""Tokens to text, and logits to tokens."""

import random

import pytest
import torch
from tiny import fresh_tokenizer
from tiny_serving import request

from finetune.data.sample import Message
from finetune.serving.engine.cache import Kept
from finetune.serving.engine.sampling import Choice
from finetune.serving.engine.text import HALF, Text

CHINESE = "红色的正方形，😀 a red square。"


def released(tokenizer, ids, stop=()):
    text = Text(tokenizer, stop)
    pieces = []
    for token in ids:
        text.add(token)
        pieces.append(text.release())
        if text.stopped:
            break
    return [*pieces, text.release(last=True)]


def test_characters_of_several_tokens_come_whole():
    tokenizer = fresh_tokenizer()
    ids = tokenizer(CHINESE)["input_ids"]
    assert len(ids) > len(CHINESE)
    pieces = released(tokenizer, ids)
    assert "".join(pieces) == CHINESE
    assert not any(HALF in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > len(CHINESE) / 2  # as soon as there is something to show


def test_pieces_make_up_what_the_tokenizer_decodes():
    """Of any tokens: broken characters, special tokens, in any order."""
    tokenizer, chance = fresh_tokenizer(), random.Random(0)
    for _ in range(200):
        ids = chance.choices(range(len(tokenizer)), k=chance.randint(1, 30))
        assert "".join(released(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("stop", ["正方", "方形，😀", "红", "e。", "\x00", CHINESE, "。。"])
def test_nothing_of_a_stop_string_is_shown(stop):
    tokenizer = fresh_tokenizer()
    pieces = released(tokenizer, tokenizer(CHINESE)["input_ids"], (stop, "never"))
    assert "".join(pieces) == CHINESE.split(stop)[0]
    if CHINESE.startswith(stop):
        assert not any(pieces)


def test_the_first_of_several_stop_strings_ends_an_answer():
    tokenizer = fresh_tokenizer()
    ids = tokenizer("one two three")["input_ids"]
    assert "".join(released(tokenizer, ids, ("three", "two", "wo th"))) == "one "


LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
QUESTION = (Message("user", ("?",)),)


@pytest.mark.parametrize(
    "temperature, top_p, kept", [(1.0, 1.0, 5), (0.5, 1.0, 5), (1.0, 0.8, 2), (2.0, 0.75, 3), (1.0, 0.01, 1)]
)
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature, top_p, kept):
    expected = (LOGITS / temperature).softmax(-1)
    expected[kept:] = 0
    expected /= expected.sum()
    choice = Choice(request(QUESTION, temperature=temperature, top_p=top_p, seed=3))
    drawn = torch.bincount(torch.tensor([choice(LOGITS) for _ in range(4000)]), minlength=5) / 4000
    assert (drawn - expected).abs().max() < 0.03
    assert not drawn[kept:].any()


def test_what_was_used_last_is_kept():
    kept = Kept(30)
    for key in "abc":
        kept.put(key, key.upper(), 10)
    assert kept.get("a") == "A"
    kept.put("d", "D", 10)
    assert [kept.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    kept.put("e", "E", 31)
    assert "e" not in kept and kept.bytes == 30
