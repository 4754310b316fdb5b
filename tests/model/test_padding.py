"""Left padding, against torch's own padding of reversed rows."""

import random

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from finetune.model.padding import left_padded


@pytest.mark.parametrize("seed", range(5))
def test_rows_end_in_the_last_column(seed):
    generator = random.Random(seed)
    rows = [[generator.randrange(100) for _ in range(generator.randint(1, 9))] for _ in range(6)]
    ids, mask = left_padded(rows, 7)
    reversed_rows = [torch.tensor(row[::-1]) for row in rows]
    assert torch.equal(ids, pad_sequence(reversed_rows, batch_first=True, padding_value=7).flip(1))
    ones = [torch.ones(len(row), dtype=torch.long) for row in rows]
    assert torch.equal(mask, pad_sequence(ones, batch_first=True).flip(1))
    assert ids.dtype == mask.dtype == torch.int64


@pytest.mark.parametrize("rows", [[], [[]], [[], []]])
def test_no_tokens_at_all(rows):
    ids, mask = left_padded(rows, 0)
    assert ids.shape == mask.shape == (len(rows), 0) and ids.dtype == mask.dtype == torch.int64


def test_the_device_is_the_given_one():
    ids, mask = left_padded([[1], [2, 3]], 0, device="meta")
    assert ids.device.type == mask.device.type == "meta" and ids.shape == (2, 2)
