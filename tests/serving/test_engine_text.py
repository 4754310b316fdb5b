"""Tokens to text, and logits to tokens."""

import random

import pytest
import torch
from tiny import fresh_tokenizer
from tiny_serving import request

from finetune.data.sample import Message
from finetune.serving.engine.cache import LRUCache
from finetune.serving.engine.sampling import Sampler
from finetune.serving.engine.text import REPLACEMENT, IncrementalDecoder

CHINESE = "红色的正方形，😀 a red square。"


def released(tokenizer, ids, stop=()):
    text = IncrementalDecoder(tokenizer, stop)
    pieces = []
    for token in ids:
        text.add(token)
        pieces.append(text.release())
        if text.stopped:
            break
    return [*pieces, text.release(last=True)]


def test_characters_of_several_tokens_are_released_whole():
    tokenizer = fresh_tokenizer()
    ids = tokenizer(CHINESE)["input_ids"]
    assert len(ids) > len(CHINESE)
    pieces = released(tokenizer, ids)
    assert "".join(pieces) == CHINESE
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > len(CHINESE) / 2  # as soon as there is something to show


def test_pieces_add_up_to_the_tokenizer_s_text():
    """Of any tokens: broken characters, special tokens, in any order."""
    tokenizer, generator = fresh_tokenizer(), random.Random(0)
    for _ in range(200):
        ids = generator.choices(range(len(tokenizer)), k=generator.randint(1, 30))
        assert "".join(released(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("stop", ["正方", "方形，😀", "红", "e。", "\x00", CHINESE, "。。"])
def test_no_part_of_a_stop_string_is_released(stop):
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
def test_tokens_are_sampled_with_their_probabilities(temperature, top_p, kept):
    expected = (LOGITS / temperature).softmax(-1)
    expected[kept:] = 0
    expected /= expected.sum()
    sampler = Sampler(request(QUESTION, temperature=temperature, top_p=top_p, seed=3))
    sampled = torch.bincount(torch.tensor([sampler(LOGITS) for _ in range(4000)]), minlength=5) / 4000
    assert (sampled - expected).abs().max() < 0.03
    assert not sampled[kept:].any()


def test_the_least_recently_used_is_evicted():
    cache = LRUCache(30)
    for key in "abc":
        cache.put(key, key.upper(), 10)
    assert cache.get("a") == "A"
    cache.put("d", "D", 10)
    assert [cache.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    cache.put("e", "E", 31)
    assert "e" not in cache and cache.bytes == 30
