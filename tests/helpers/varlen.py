"""In the place of a GPU's attention for sequences of many lengths: one that loops over them."""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from finetune.model import row_plan


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """As `torch.nn.attention.varlen.varlen_attn`, as strict: half precision, ends of 32 bits, no gaps in widths.
    Queries (T, H, W), keys and values (K, G, W) -> (T, H, W).
    """
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert query.dtype == key.dtype == value.dtype and query.dtype in (torch.float16, torch.bfloat16)
    assert all(x.ndim == 3 and x.stride(-1) == 1 and x.shape[-1] % 8 == 0 for x in (query, key, value))
    assert all(x.dtype == torch.int32 and x.is_contiguous() and x[0] == 0 for x in (cu_seq_q, cu_seq_k))
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key)) and len(key) == len(value)
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max()) and type(max_q) is type(max_k) is int
    back, ahead = window_size
    results = []
    ends = [itertools.pairwise(ends.tolist()) for ends in (cu_seq_q, cu_seq_k)]
    for (begin, end), (first, last) in zip(*ends, strict=True):
        distance = torch.arange(last - first - (end - begin), last - first)[:, None] - torch.arange(last - first)
        mask = ((distance >= -ahead) | (ahead < 0)) & ((distance <= back) | (back < 0))
        own = [x.transpose(0, 1) for x in (query[begin:end], key[first:last], value[first:last])]
        with torch.autocast(query.device.type, enabled=False):
            attended = scaled_dot_product_attention(*own, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        results.append(attended.transpose(0, 1))
    return torch.cat(results)


def of_2_11(*inputs: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """PyTorch 2.11 has no argument for groups, and takes them unasked."""
    return varlen_attn(*inputs, scale=scale, window_size=window_size, enable_gqa=True)


def use_kernel(monkeypatch: Any) -> list[tuple[Tensor, ...]]:
    """Rows by segments are attended to as on a GPU that has the kernel; what it is called with."""
    calls: list[tuple[Tensor, ...]] = []

    def kernel(*inputs: Any, enable_gqa: bool, **options: Any) -> Tensor:
        calls.append(inputs)
        return varlen_attn(*inputs, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(row_plan, "varlen_kernel", lambda: kernel)
    monkeypatch.setattr(row_plan, "_is_ampere", lambda device: True)
    return calls
