"""Rows of token ids as one batch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def left_padded_positions(positions: Sequence[Sequence[Sequence[int]] | None], mask: Tensor) -> Tensor | None:
    """Positions (3, T) of rows, or None for 0, 1, 2, ..., as `left_padded` lays them out: (3, rows, longest row), 0
    where `mask` is. None where no row has its own.
    """
    if not any(positions):
        return None
    plain = (mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1).clone()
    for number, own in enumerate(positions):
        if own is not None:
            plain[:, number, plain.shape[2] - len(own[0]) :] = torch.tensor(own, device=mask.device)
    return plain


def going_on(positions: list[list[int]] | None, count: int) -> list[list[int]] | None:
    """Positions (3, T) of a question, and of `count` tokens of text behind it; None where it has none of its own."""
    return positions and [[*row, *range(row[-1] + 1, row[-1] + 1 + count)] for row in positions]


def position_ids(mask: Tensor, rope: Tensor | None) -> Tensor:
    """Positions (B, T) of rows that are padded on the left, by their mask; with `rope` (3, B, T), where positions have
    three dimensions, (4, B, T).
    """
    plain = (mask.cumsum(-1) - 1).clamp(min=0)
    return plain if rope is None else torch.cat([plain[None], rope])


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
