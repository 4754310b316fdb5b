"""Which layouts of training rows are exact for an LLM: tried on a few tokens, not looked up.

A sample in a row must not depend on the others at all (no gradient flows to them, to the bit), and its hidden states
must be those that it has alone, by the LLM's own attention, sliding windows included. LLMs with another attention
(ALiBi), whose positions can't be given, or with a recurrent state fail.

Shapes:  T tokens of the row   S tokens of the sample that is compared   D features
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from inspect import signature
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from finetune.common.memory import is_out_of_memory
from finetune.model.row_plan import RowPlan, RowSegment, attending, by_segments, following

Result = TypeVar("Result")
WINDOWS = ("sliding_window", "attention_chunk_size")  # of a config: how far attention goes back
# Of the norm of hidden states: what may differ in float32, and the least and the most that does in half precision.
EXACT, ROUNDED, MOST_ROUNDED = 1e-3, 0.03, 0.3
SHORT_WINDOW = 4  # tokens: the width at which they are tried
# Token ids of what stands in a row: a sample before another, and two with one prefix.
OTHER, PREFIX, BRANCH, SAMPLE = range(40, 45), range(30, 36), range(20, 24), range(4, 11)


class RowKind(StrEnum):
    """How an LLM's training rows are laid out."""

    PADDED = "padded"  # a sample each
    PACKED = "packed"  # samples one after the other, kept apart by the LLM's own mask over the row
    SEGMENTS = "segments"  # as packed, with attention by segments
    SHARED = "shared"  # as segments, and what samples of a row begin with stands there once


class Layout(NamedTuple):
    """`why`: why the LLM takes none better; '' where it takes what was asked for."""

    kind: RowKind
    why: str = ""


def row_kind(causal_lm: Any, share: bool = True, by_segments: bool = True) -> RowKind:
    """The best that is exact for this LLM, tried; without `by_segments`, by its own attention."""
    return layout(causal_lm, share, by_segments).kind


def layout(causal_lm: Any, share: bool = True, by_segments: bool = True) -> Layout:
    """As `row_kind`, with the reason. Raises what PyTorch does where memory runs out."""
    settable = attending(causal_lm)._can_set_attn_implementation()
    if by_segments and settable:
        why = why_unshared(causal_lm) if share else ""
        if share and not why:
            if shares_prefixes(causal_lm):
                return Layout(RowKind.SHARED)
            why = "tried: samples behind one prefix differ from samples alone"
        if _keeps_apart(causal_lm, RowPlan((RowSegment(0, 5), RowSegment(5, 12)))):
            return Layout(RowKind.SEGMENTS, why)
    if packs_exactly(causal_lm):
        found = "tried: by segments samples differ from samples alone" if settable else "its attention is its own code"
        return Layout(RowKind.PACKED, found if by_segments else "")
    return Layout(RowKind.PADDED, _why_padded(causal_lm) or "tried: samples of one row differ from samples alone")


def likely_layout(causal_lm: Any, share: bool = True, by_segments: bool = True) -> Layout:
    """As `layout`, by the LLM's class and config: of an LLM without weights, which can't be tried."""
    if why := _why_padded(causal_lm):
        return Layout(RowKind.PADDED, why)
    if by_segments and attending(causal_lm)._can_set_attn_implementation():
        why = why_unshared(causal_lm) if share else ""
        return Layout(RowKind.SHARED if share and not why else RowKind.SEGMENTS, why)
    return Layout(RowKind.PACKED, "its attention is its own code" if by_segments else "")


def router_loss(causal_lm: Any) -> float:
    """By how much trl weighs the auxiliary loss of an LLM's routers; 0 where there is none."""
    config = causal_lm.config.get_text_config()
    return float(getattr(config, "router_aux_loss_coef", 0.0)) if hasattr(config, "output_router_logits") else 0.0


def why_unshared(causal_lm: Any) -> str:
    """What no trial of hidden states shows; '' where nothing is against sharing."""
    weight = router_loss(causal_lm)
    if not weight:
        return ""
    return (
        f"the auxiliary loss of its routers (router_aux_loss_coef: {weight:g}) is a mean over all tokens of all samples"
    )


def _why_padded(causal_lm: Any) -> str:
    """What is known without a trial; '' where rows may be packed."""
    config = causal_lm.config.get_text_config()
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if kinds or causal_lm._is_stateful:
        layers = f"its layers ({', '.join(sorted(kinds))})" if kinds else "the state that it keeps"
        return f"in {layers} a sample would depend on what stands before it in the row"
    if "position_ids" not in signature(causal_lm.forward).parameters:
        return "it takes no positions, which would begin anew with each sample"
    return ""


def packs_exactly(causal_lm: Any) -> bool:
    """Whether restarting positions alone keep packed samples apart in this LLM, by its own attention."""
    return _keeps_apart(causal_lm, None)


def _keeps_apart(causal_lm: Any, plan: RowPlan | None) -> bool:
    """A sample behind another."""
    row, alone = _Row([OTHER, SAMPLE], [0, 0], plan), _Row([SAMPLE], [0])
    gradient = _gradient_if_equal(causal_lm, row, alone, range(5, 12))
    return gradient is not None and float(gradient[:5].abs().sum()) == 0


def shares_prefixes(causal_lm: Any) -> bool:
    """Whether samples may share their beginning in this LLM, which attends by segments. Of two branches behind one
    prefix, and all behind a sample that shares nothing, the states of the prefix and of the second branch must be those
    that they have alone; gradients must flow from that branch to the prefix, and to nothing else.
    """
    plan = RowPlan((RowSegment(0, 5), RowSegment(5, 11), RowSegment(11, 15, 5, 11), RowSegment(15, 22, 5, 11)))
    row, alone = _Row([OTHER, PREFIX, BRANCH, SAMPLE], [0, 0, 6, 6], plan), _Row([PREFIX, SAMPLE], [0, 6])
    gradient = _gradient_if_equal(causal_lm, row, alone, [*range(5, 11), *range(15, 22)])
    if gradient is None:
        return False
    other, prefix, branch = (float(part.abs().sum()) for part in gradient[:15].split([5, 6, 4]))
    return other == branch == 0 < prefix


class _Row(NamedTuple):
    """A row to be tried. `pieces`: token ids, one after the other; `starts`: the positions of their first tokens."""

    pieces: Sequence[Sequence[int]]
    starts: Sequence[int]
    plan: RowPlan | None = None


def _gradient_if_equal(causal_lm: Any, row: _Row, alone: _Row, same: Sequence[int]) -> Tensor | None:
    """(T, D): what half of the features of a row's last piece, summed, send to the embeddings. None where the LLM
    refuses the row, or the tokens `same` have other states in it than those that stand alone.
    """

    def compute() -> Tensor | None:
        with torch.no_grad():
            expected = _states(causal_lm, alone, _embeddings(causal_lm, alone))
        allowed_error = tolerance(causal_lm) * expected.norm()
        embeddings = _embeddings(causal_lm, row).requires_grad_()
        with torch.enable_grad(), by_segments(causal_lm) if row.plan else nullcontext():
            states = _states(causal_lm, row, embeddings)
            if not (states[same].detach() - expected).norm() < allowed_error:
                return None
            # Not all features: their sum is a constant behind a layer norm.
            (gradient,) = torch.autograd.grad(states[-len(row.pieces[-1]) :, ::2].sum(), embeddings)
        return gradient[0]

    with short_windows(causal_lm):
        return unless_refused(compute)


def _embeddings(causal_lm: Any, row: _Row) -> Tensor:
    """(1, T, D)"""
    table = causal_lm.get_input_embeddings()
    ids = torch.tensor([token for piece in row.pieces for token in piece], device=table.weight.device)
    embeddings: Tensor = table(ids[None]).detach()
    return embeddings


def _states(causal_lm: Any, row: _Row, embeddings: Tensor) -> Tensor:
    """(T, D), float32, of embeddings (1, T, D)."""
    places = [start + place for piece, start in zip(row.pieces, row.starts, strict=True) for place in range(len(piece))]
    positions = torch.tensor([places], device=embeddings.device)
    with following(row.plan, causal_lm):
        outputs = causal_lm.base_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
    states: Tensor = outputs.last_hidden_state[0].float()
    return states


def unless_refused(compute: Callable[[], Result]) -> Result | None:
    """None where an LLM refuses a row: it takes no such argument, or another mask. Too little memory is raised."""
    try:
        return compute()
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return None


@torch.no_grad()
def tolerance(causal_lm: Any) -> float:
    """By how much of their norm hidden states that should be equal may differ. In half precision and over 8-bit weights
    rows of another length round otherwise, and on a GPU more so, as it has other kernels for them: three times as much
    as the states of a row differ from those of copies computed at once may be rounding.
    """
    table = causal_lm.get_input_embeddings()
    if table.weight.dtype == torch.float32 and not any(hasattr(p, "SCB") for p in causal_lm.parameters()):
        return EXACT
    row = table(torch.arange(4, 17, device=table.weight.device)[None])
    decoder = causal_lm.base_model if attending(causal_lm) is causal_lm else causal_lm.get_decoder()

    def rounding() -> float:
        alone, *others = (
            decoder(inputs_embeds=row.expand(copies, -1, -1), use_cache=False).last_hidden_state[0].float()
            for copies in (1, 2, 3)
        )
        return max(float((other - alone).norm() / alone.norm()) for other in others)

    measured = unless_refused(rounding)  # None where it needs more than embeddings
    return ROUNDED if measured is None else min(max(ROUNDED, 3 * measured), MOST_ROUNDED)


@contextmanager
def short_windows(causal_lm: Any) -> Iterator[None]:
    """Sliding windows of a few tokens, so that a short row is longer than they are."""
    config = causal_lm.config.get_text_config()
    names = [name for name in WINDOWS if isinstance(getattr(config, name, None), int)]
    before = {name: getattr(config, name) for name in names}
    try:
        for name in names:
            setattr(config, name, SHORT_WINDOW)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
