"""Rows of token ids as one batch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 of shape (rows, longest row): all rows end in the last column, `pad`
    and mask 0 come before them.
    """
    width = max(map(len, rows), default=0)
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    shape = (len(rows), width)
    return (
        torch.tensor(ids, dtype=torch.long, device=device).view(shape),
        torch.tensor(mask, dtype=torch.long, device=device).view(shape),
    )
