"""Attention of a packed row by segments: no mask over the whole row, and what several samples begin with only once.

    tokens     [ system, picture .... ][ question 1, answer ][ question 2, answer ][ another sample ..... ]
    segments     0                       1, behind 0           2, behind 0           3

A token attends to its own segment up to itself, and to the whole segment that stands before it (its prefix), as if the
two followed each other. A sample that shares nothing is a segment without a prefix.

The plan reaches the layers in the place of a mask, so that activation checkpoints keep it as long as they keep a mask.

Shapes:  T tokens of the row   Q tokens of a segment   P tokens of its prefix   H heads   G key-value heads   W a head's
width
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib.util import find_spec
from inspect import signature
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

NAME = "finetune_segments"


class RowSegment(NamedTuple):
    """Tokens [begin, end) of a row, behind those of another segment, [prefix_begin, prefix_end), or of none."""

    begin: int
    end: int
    prefix_begin: int = 0
    prefix_end: int = 0

    @property
    def length(self) -> int:
        return self.end - self.begin

    @property
    def prefix(self) -> int:
        """Tokens of its prefix."""
        return self.prefix_end - self.prefix_begin


@dataclass(frozen=True)
class RowPlan:
    """The segments of a packed row, in their order, without gaps. `bidirectional`: tokens [begin, end), each within one
    segment, that also attend to those behind them up to the end.
    """

    segments: tuple[RowSegment, ...]
    bidirectional: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class _PlanAsMask:
    """What the layers are given as their attention mask. `window`: tokens that one attends to, itself included."""

    plan: RowPlan
    window: int | None
    device: Any
    ndim = 4  # PaliGemma hands it to its decoder, which asks what kind of mask it is

    @cached_property
    def masks(self) -> tuple[Tensor | None, ...]:
        """For each segment, true where attention goes (Q, P + Q), or None where it is plainly causal."""
        return _masks(self.plan, self.window, self.device, False)

    @cached_property
    def all_masks(self) -> tuple[Tensor | None, ...]:
        """As `masks`, of causal segments as well."""
        return _masks(self.plan, self.window, self.device, True)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (1, 1, self.plan.segments[-1].end, self.plan.segments[-1].end)


_current: ContextVar[RowPlan | None] = ContextVar("row_plan", default=None)


@contextmanager
def by_segments(causal_lm: Any) -> Iterator[None]:
    """Let an LLM attend by segments. To last until the backward pass is over: activation checkpoints attend again."""
    llm = attending(causal_lm)
    before = llm.config._attn_implementation
    llm.set_attn_implementation({"": NAME})  # not that of encoders inside
    try:
        yield
    finally:
        llm.set_attn_implementation({"": before})


def attending(causal_lm: Any) -> Any:
    """Whose attention is chosen: the LLM's; of a base its decoder's, for its encoders have their own."""
    return causal_lm if causal_lm.config.get_text_config() is causal_lm.config else causal_lm.get_decoder()


@contextmanager
def following(plan: RowPlan | None, causal_lm: Any) -> Iterator[None]:
    """A forward pass over a row with this plan, within `by_segments`; without a plan, by the LLM's own attention."""
    if (plan is None) == (attending(causal_lm).config._attn_implementation == NAME):
        raise AssertionError("a row's plan and attention by segments go together")
    token = _current.set(plan)
    try:
        yield
    finally:
        _current.reset(token)


def _mask(*, device: Any = None, local_size: int | None = None, **unused: Any) -> _PlanAsMask:
    plan = _current.get()
    assert plan is not None
    return _PlanAsMask(plan, local_size, device)


def _masks(plan: RowPlan, window: int | None, device: Any, every: bool) -> tuple[Tensor | None, ...]:
    return tuple(
        _visible_to(segment, plan, window, device) if every or not _is_causal(segment, plan, window) else None
        for segment in plan.segments
    )


_masks_of_layer = lru_cache(maxsize=4)(_masks)  # layers ask for the same ones


def _is_causal(segment: RowSegment, plan: RowPlan, window: int | None) -> bool:
    within_window = window is None or window >= segment.length
    return within_window and not segment.prefix and not _within(plan, segment)


def _takes_no_groups(query: Tensor, key: Tensor) -> bool:
    """Whether there are fewer heads of keys than of queries where a GPU's fused attention takes only as many: before
    Ampere, and in float32. What PyTorch takes instead keeps all scores; with a mask transformers repeats heads.
    """
    fused = _is_ampere(query.device) and query.dtype != torch.float32
    return _is_gpu(query.device) and query.shape[1] != key.shape[1] and not fused


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _is_ampere(device: Any) -> bool:
    """Whether it is a GPU of this kind or a later one."""
    return _is_gpu(device) and torch.cuda.get_device_capability(device) >= (8, 0)


def _within(plan: RowPlan, segment: RowSegment) -> list[tuple[int, int]]:
    return [span for span in plan.bidirectional if segment.begin <= span[0] < segment.end]


def _visible_to(segment: RowSegment, plan: RowPlan, window: int | None, device: Any) -> Tensor:
    """(Q, P + Q): whether a token attends to one of its prefix and segment."""
    whole = segment.prefix + segment.length
    query = torch.arange(segment.prefix, whole, device=device)[:, None]
    key = torch.arange(whole, device=device)
    visible = key <= query
    if window is not None:
        visible = visible & (key > query - window)
    for begin, end in _within(plan, segment):
        first, last = (place - segment.begin + segment.prefix for place in (begin, end))
        visible = visible | ((query >= first) & (query < last) & (key >= first) & (key < last))
    return visible


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: _PlanAsMask,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Queries (1, H, T, W), keys and values (1, G, T, W) -> (1, T, H, W)."""
    plan, window = attention_mask.plan, attention_mask.window
    own = any(options.get(name) is not None for name in ("softcap", "s_aux"))  # only the LLM's own code has these
    if not own and not dropout and not plan.bidirectional and _has_flash_kernel(query, value):
        return at_once(query, key, value, plan, window, scaling, varlen_kernel()), None
    every = not own and _takes_no_groups(query, key)
    if plan.bidirectional:  # with them a window comes as a function, not as a number
        window = module.config.sliding_window if options.get("sliding_window") else None
        masks = _masks_of_layer(plan, window, query.device, every)
    else:
        masks = attention_mask.all_masks if every else attention_mask.masks
    parts = []
    own_queries, own_keys, own_values = (_by_segment(rows, plan) for rows in (query, key, value))
    for segment, visible in zip(plan.segments, masks, strict=True):
        queries = own_queries[segment.begin]
        keys, values = _behind_prefix(own_keys, segment), _behind_prefix(own_values, segment)
        if own:
            eager = sys.modules[type(module).__module__].eager_attention_forward
            mask = _visible_to(segment, plan, window, query.device)
            added = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
            part = eager(module, queries, keys, values, added[None, None], dropout=dropout, scaling=scaling, **options)
        else:
            options["is_causal"] = visible is None
            seen = None if visible is None else visible[None, None]
            part = sdpa_attention_forward(module, queries, keys, values, seen, dropout, scaling, **options)
        parts.append(part[0])
    return torch.cat(parts, 1), None


def _by_segment(rows: Tensor, plan: RowPlan) -> dict[int, Tensor]:
    """(1, G, T, W) -> {where a segment begins: (1, G, Q, W)}. Split, as the gradient of each slice would be as long as
    the row.
    """
    lengths = [segment.length for segment in plan.segments]
    return dict(zip([segment.begin for segment in plan.segments], rows.split(lengths, 2), strict=True))


def _behind_prefix(rows: dict[int, Tensor], segment: RowSegment) -> Tensor:
    """Rows of a segment's prefix and its own (1, G, P + Q, W)."""
    own = rows[segment.begin]
    return torch.cat([rows[segment.prefix_begin], own], 2) if segment.prefix else own


def _has_flash_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's own flash attention for sequences of many lengths takes these: it needs an Ampere GPU, and on
    those of compute capability 8.6, 8.9 and 12 has no gradient at widths from 193 to 224.
    """
    width = query.shape[-1]
    if not _is_ampere(query.device) or varlen_kernel() is None:
        return False
    half = torch.is_autocast_enabled(query.device.type) or query.dtype in (torch.float16, torch.bfloat16)
    return half and width == value.shape[-1] and width % 8 == 0 and (width <= 192 or 224 < width <= 256)


@cache
def varlen_kernel() -> Any:
    """`torch.nn.attention.varlen.varlen_attn`; None before PyTorch 2.11 (missing, or without windows and scale), and
    where PyTorch was built without flash attention.
    """
    if not torch.backends.cuda.is_flash_attention_available() or find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn if "window_size" in signature(varlen_attn).parameters else None


def at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: RowPlan,
    window: int | None,
    scaling: float | None,
    kernel: Callable[..., Any],
) -> Tensor:
    """All segments in one call of a kernel with the signature of `torch.nn.attention.varlen.varlen_attn`, whose causal
    mask ends with the last key. Shapes as in attention functions of transformers.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    places, ends_query, ends_key, longest_query, longest_key = _gathered(plan, query.device)
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    if places is not None:
        keys, values = keys[places], values[places]
    # PyTorch 2.11 takes fewer heads of keys than of queries unasked, and has no argument for it.
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]} if _asks_for_groups(kernel) else {}
    result: Tensor = kernel(
        query[0].transpose(0, 1).contiguous(),
        keys.contiguous(),
        values.contiguous(),
        ends_query,
        ends_key,
        longest_query,
        longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    return result[None]


@cache
def _asks_for_groups(kernel: Callable[..., Any]) -> bool:
    return "enable_gqa" in signature(kernel).parameters


@lru_cache(maxsize=4)  # layers ask for the same plan one after the other
def _gathered(plan: RowPlan, device: torch.device) -> tuple[Tensor | None, Tensor, Tensor, int, int]:
    """Where the keys of all segments stand in the row, prefixes before their segments, None where there are no
    prefixes; cumulated numbers of queries and keys, from 0; the most queries and keys of a segment.
    """
    queries = [segment.length for segment in plan.segments]
    keys = [segment.prefix + segment.length for segment in plan.segments]
    places = [
        torch.cat([torch.arange(s.prefix_begin, s.prefix_end), torch.arange(s.begin, s.end)]) for s in plan.segments
    ]
    ends = [torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device) for lengths in (queries, keys)]
    gathered = torch.cat(places).to(device) if queries != keys else None
    return gathered, ends[0], ends[1], max(queries), max(keys)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)  # type: ignore[arg-type]
