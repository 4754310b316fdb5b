"""Attention by segments of a packed row: one call of PyTorch's kernel for many lengths on a GPU from Ampere on, beside
SDPA a segment in the same dtype, and both against the whole row in float64. Values and gradients.
"""

from collections.abc import Callable
from itertools import product
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.gpu.setting import Setting
from finetune.model import row_plan
from finetune.model.row_plan import RowPlan, RowSegment

DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = (64, 128)
HEADS = ((8, 2), (4, 4))  # of queries, of keys and values
WINDOWS = (None, 24)  # tokens
# Times the error of SDPA in the same dtype, which may compute in float32 where the kernel rounds the probabilities, and
# relative errors that rounding alone explains. A token too many or too few is an error of 0.06 or more.
WORSE = 2.0
LEAST = {torch.bfloat16: 5e-3, torch.float16: 7e-4}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def check(setting: Setting) -> str:
    torch.manual_seed(0)
    lengths = (1, 2) if setting.toy else (1, 129)  # of a segment: in units of which the others are made
    plans = {"uneven": uneven(*lengths), "branches": branches(*lengths)}
    worst: dict[torch.dtype, tuple[float, float]] = dict.fromkeys(DTYPES, (0.0, 0.0))
    kernel = False
    for (name, plan), dtype, width, heads, window, mixed in product(
        plans.items(), DTYPES, WIDTHS[: 1 if setting.toy else None], HEADS, WINDOWS, (False, True)
    ):
        inputs = row(plan, heads, width, setting.device)
        expected = outcome(lambda *qkv, p=plan, w=window: whole_row(*qkv, p, w), [x.to(dtype).double() for x in inputs])
        by_segment = outcome(
            lambda *qkv, p=plan, w=window: torch.cat([sdpa(*qkv, s, w) for s in p.segments], 1),
            [x.to(dtype) for x in inputs],
        )
        # Queries and keys may be float32 where the training's autocast hasn't met them yet.
        taken = inputs if mixed else [x.to(dtype) for x in inputs]
        with torch.autocast(setting.device, dtype, enabled=mixed):
            kernel |= row_plan._has_flash_kernel(taken[0], taken[2])
            found = outcome(lambda *qkv, p=plan, w=window: ours(*qkv, p, w), taken)
        errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
        usual = [relative(a, b) for a, b in zip(by_segment, expected, strict=True)]
        for error, other in zip(errors, usual, strict=True):
            assert error <= WORSE * other + LEAST[dtype], (
                f"{name}, {dtype}, width {width}, heads {heads}, window {window}, autocast {mixed}: errors of output "
                f"and gradients {errors}, of SDPA {usual}"
            )
        worst[dtype] = max(worst[dtype], (max(errors), max(usual)))
    assert kernel == row_plan._is_ampere(setting.device), (
        "PyTorch's kernel for many lengths is missing, or takes other arguments"
    )
    figures = "; ".join(f"{str(d)[6:]} {one:.1e}, SDPA {other:.1e}" for d, (one, other) in worst.items())
    return f"{'one kernel' if kernel else 'a segment a call'}; greatest error of output and gradients: {figures}"


def uneven(one: int, many: int) -> RowPlan:
    lengths = [one, many, 7 * one + many, 2 * many]
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    return RowPlan(tuple(RowSegment(end - length, end) for end, length in zip(ends, lengths, strict=True)))


def branches(one: int, many: int) -> RowPlan:
    """Behind a long prefix, behind a short one, and a segment by itself."""
    first, second = 2 * many + 3, 5
    segments = [RowSegment(0, first)]
    for length in (one, many, 40 * one):
        begin = segments[-1].end
        segments.append(RowSegment(begin, begin + length, 0, first))
    begin = segments[-1].end
    segments.append(RowSegment(begin, begin + second))
    segments.append(RowSegment(begin + second, begin + second + many, begin, begin + second))
    end = segments[-1].end
    segments.append(RowSegment(end, end + many + 1))
    return RowPlan(tuple(segments))


def row(plan: RowPlan, heads: tuple[int, int], width: int, device: str) -> list[Tensor]:
    """Queries (1, H, T, W), keys and values (1, G, T, W) in float32."""
    queries, keys = heads
    tokens = plan.segments[-1].end
    return [torch.randn(1, count, tokens, width, device=device) for count in (queries, keys, keys)]


def outcome(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    """The output (1, T, H, W), and what a random sum of it sends to each of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = attend(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad((output.double() * weights.double()).sum(), leaves)]


def relative(found: Tensor, expected: Tensor) -> float:
    error = (found.double() - expected).norm() / expected.norm()
    return float(error) if torch.isfinite(error) else float("inf")


def ours(query: Tensor, key: Tensor, value: Tensor, plan: RowPlan, window: int | None) -> Tensor:
    """As a layer of an LLM calls it."""

    config = SimpleNamespace(_attn_implementation=row_plan.NAME)
    config.get_text_config = lambda: config

    layer = nn.Module()
    layer.num_key_value_groups = query.shape[1] // key.shape[1]
    layer.is_causal = True
    with row_plan.following(plan, SimpleNamespace(config=config)):
        mask = ALL_MASK_ATTENTION_FUNCTIONS[row_plan.NAME](device=query.device, local_size=window)
        output, _ = ALL_ATTENTION_FUNCTIONS[row_plan.NAME](layer, query, key, value, mask, scaling=0.11)
    result: Tensor = output
    return result


def sdpa(query: Tensor, key: Tensor, value: Tensor, segment: RowSegment, window: int | None) -> Tensor:
    """A segment's output (1, Q, H, W), by PyTorch's attention under a mask."""
    own, before = slice(segment.begin, segment.end), slice(segment.prefix_begin, segment.prefix_end)
    keys, values = (torch.cat([x[:, :, before], x[:, :, own]], 2) for x in (key, value))
    back = torch.arange(segment.prefix, keys.shape[2])[:, None] - torch.arange(keys.shape[2])
    mask = (back >= 0) if window is None else (back >= 0) & (back < window)
    grouped = query.shape[1] != key.shape[1]
    output = scaled_dot_product_attention(
        query[:, :, own], keys, values, attn_mask=mask.to(query.device), scale=0.11, enable_gqa=grouped
    )
    return output.transpose(1, 2)


def whole_row(query: Tensor, key: Tensor, value: Tensor, plan: RowPlan, window: int | None) -> Tensor:
    """By softmax under a mask of all tokens, made token by token from what a plan means."""
    tokens = query.shape[2]
    visible = torch.zeros(tokens, tokens, dtype=torch.bool)
    for segment in plan.segments:
        seen = [*range(segment.prefix_begin, segment.prefix_end)]
        for number in range(segment.begin, segment.end):
            seen.append(number)
            visible[number, seen if window is None else seen[-window:]] = True
    keys, values = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = (0.11 * query @ keys.transpose(2, 3)).masked_fill(~visible.to(query.device), -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2)
