"""What training samples begin with in common, tokens and media: a row needs it only once, as their prefix."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from finetune.model.composite import MultimodalModel
from finetune.model.prefixes import IGNORED, most_shared, shared_tokens
from finetune.model.row_layout import RowKind
from finetune.recipe.schema import Stage
from finetune.training.pack import LEAST_TOKENS, MOST_BRANCHES, Rows, Sharing, plan_rows
from finetune.training.samples import TokenizedSamples, groups_of

Numbers: TypeAlias = npt.NDArray[Any]
AT_ONCE = 2_000  # samples whose tokens are copied at once
LEAST_SAVED = 0.1  # of a group's tokens; below that, and below LEAST_TOKENS, samples are left to be shuffled freely


def rows_of(
    samples: TokenizedSamples,
    weights: Sequence[float],
    stage: Stage,
    model: MultimodalModel,
    kind: RowKind,
    capacity: int,
    seed: int,
) -> tuple[Rows, Sharing]:
    """The rows of all epochs of a stage, see `plan_rows`, and what its samples share. `weights`: of the training rows,
    each of which has as many samples.
    """
    sharing = Sharing.none(len(samples))
    if kind is RowKind.SHARED:
        sharing = sharing_of(samples, model.composition.fusion.by_sample, model.placement.prompts_both_ways)
    if (each := len(samples) // len(weights)) > 1:
        weights = array("d", (weight for weight in weights for _ in range(each)))
    rows = plan_rows(
        samples.taught_lengths,
        weights,
        capacity=capacity,
        epochs=int(stage.epochs),
        seed=seed,
        groups=groups_of(samples),
        sharing=sharing,
    )
    return rows, sharing


def sharing_of(samples: TokenizedSamples, media_in_prefix: bool = False, whole_prompts: bool = False) -> Sharing:
    """Groups of samples such that rows save most tokens, if each sample is in one group. `media_in_prefix`: only where
    all media of a group stand in its prefix; `whole_prompts`: only where all of its prompts do.
    """
    count = len(samples)
    beginnings, starts = _beginnings(samples)
    order = _sorted(beginnings, starts)
    in_order = (beginnings[starts[number] : starts[number + 1]] for number in order)
    shared = array("q", (_equal(one, other) for one, other in pairwise(in_order)))
    del beginnings, in_order
    needed = [0] * count
    if media_in_prefix:
        ends = samples.column("media_ends")
        needed = [max(ends[number], default=0) for number in order]
    if whole_prompts:
        prompts = _prompts(samples)
        needed = [max(least, int(prompts[number])) for least, number in zip(needed, order, strict=True)]
    lengths, teachers = samples.taught_lengths, samples.arrow("teacher_input_ids")
    taught = teachers.is_valid().to_numpy()
    group, saved = array("q", range(count)), [0] * count
    for span in _best_groups(shared, needed):
        members = order[span.begin : span.end].tolist()
        tokens = min(span.depth, _shared_by_teachers(samples, members)) if taught[members].all() else span.depth
        least = LEAST_SAVED * sum(lengths[number] for number in members)
        if tokens < LEAST_TOKENS or tokens * _spared(len(members)) < least:
            continue
        for number in members:
            group[number], saved[number] = members[0], tokens
    return Sharing(group, saved)


def _spared(count: int) -> int:
    """How many of so many samples find their prefix in the row."""
    return count - -(-count // MOST_BRANCHES)


def _beginnings(samples: TokenizedSamples) -> tuple[Numbers, Numbers]:
    """(what may stand in a prefix of each sample, one after another: token ids and, in the place of a medium's, its
    number; where those of each sample begin, and their end). Big-endian, so that bytes sort as they do.
    """
    count = len(samples)
    parts = [samples.select(range(at, min(at + AT_ONCE, count))) for at in range(0, max(count, 1), AT_ONCE)]
    names = pc.unique(pa.chunked_array([_media_names(part).unique() for part in parts], pa.string()))
    # Arrow's memory, of which only what is written counts: glibc's malloc would keep as much from then on.
    result = np.frombuffer(pa.allocate_buffer(4 * sum(samples.lengths)), ">u4")
    end, sizes = 0, []
    for part in parts:
        ids, size = _beginnings_of(part, names)
        result[end : end + len(ids)] = ids
        end += len(ids)
        sizes.append(size)
    return result[:end], np.concatenate([[0], np.cumsum(np.concatenate(sizes))])


def _beginnings_of(samples: TokenizedSamples, names: pa.Array) -> tuple[Numbers, Numbers]:
    """(the ids, uint32 and big-endian; how many each sample has). `names`: of all media."""
    ids, ends = _flat(samples, "input_ids")
    most = np.minimum(_prompts(samples), np.diff(ends) - 1)  # see `most_shared`
    ids = ids.astype(">u4")
    begins, media_ends = _flat(samples, "media_begins")
    stops, _ = _flat(samples, "media_ends")
    owners = np.repeat(np.arange(len(samples)), np.diff(media_ends))
    numbers = pc.index_in(_media_names(samples), value_set=names).to_numpy()
    cut = (begins < most[owners]) & (most[owners] < stops)
    most[owners[cut]] = begins[cut]
    starts, sizes = ends[:-1], stops - begins
    places = np.repeat(starts[owners] + begins - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
    ids[places] = np.repeat(2**31 + numbers.astype(np.int64), sizes)
    return ids[np.arange(len(ids)) < np.repeat(starts + most, np.diff(ends))], most


def _sorted(beginnings: Numbers, starts: Numbers) -> Numbers:
    """The numbers of the samples in the order of their beginnings."""
    buffers = [None, pa.py_buffer(4 * starts.astype(np.int64)), pa.py_buffer(beginnings)]
    keys = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(starts) - 1, buffers)
    order: Numbers = pc.array_sort_indices(keys).to_numpy().astype(np.int64)
    return order


def _flat(samples: TokenizedSamples, name: str) -> tuple[Numbers, Numbers]:
    """(the numbers in the lists of a column, one after another; where the list of each sample begins, and their end)"""
    column = samples.arrow(name)
    sizes = pc.list_value_length(column).to_numpy()
    return pc.list_flatten(column).to_numpy(), np.concatenate([[0], np.cumsum(sizes)])


def _prompts(samples: TokenizedSamples) -> Numbers:
    """`prompt_tokens` of each sample's labels."""
    labels, ends = _flat(samples, "labels")
    learned = labels != IGNORED
    learned[ends[:-1]] = False  # nothing predicts the first
    places = np.append(np.flatnonzero(learned), len(labels))
    sizes = np.diff(ends)
    first: Numbers = np.minimum(places[np.searchsorted(places, ends[:-1])] - ends[:-1], sizes)
    return first


def _media_names(samples: TokenizedSamples) -> pa.ChunkedArray:
    """Of all media, one after another: equal for equal media."""
    kinds, keys = (pc.list_flatten(samples.arrow(name)) for name in ("media_kinds", "media_keys"))
    return pc.binary_join_element_wise(kinds, keys, " ")


def _equal(one: Numbers, other: Numbers) -> int:
    """With how many equal numbers both begin."""
    count = min(len(one), len(other))
    different = np.flatnonzero(one[:count] != other[:count])
    return int(different[0]) if len(different) else count


def _shared_by_teachers(samples: TokenizedSamples, members: Sequence[int]) -> int:
    """Tokens with which the rows of the teacher begin."""
    rows = [samples[number] for number in members]
    most = min(most_shared(row.teacher_labels or ()) for row in rows)
    return shared_tokens([row.teacher_input_ids or () for row in rows], most)


@dataclass(slots=True)
class _Node:
    """Sorted samples [begin, end) that share `depth` tokens, and may only stand behind a prefix of at least `least`.
    `saved`: tokens that their best division into groups saves, which is this one group where `children` is None, or
    that of the children.
    """

    begin: int
    depth: int
    end: int = 0
    least: int = 0
    saved: int = 0
    children: list["_Node"] | None = None

    def add(self, child: "_Node") -> None:
        self.children = self.children or []
        if child.end - child.begin > 1:  # no sample alone, since these are many
            self.children.append(child)
        self.saved += child.saved
        self.end = child.end
        self.least = max(self.least, child.least)

    def close(self) -> None:
        together = self.depth * _spared(self.end - self.begin)
        if self.depth >= self.least and together > self.saved:
            self.saved, self.children = together, None


def _best_groups(shared: Sequence[int], least: Sequence[int]) -> list[_Node]:
    """The groups, of two or more, that save most: the tree of all that share something is walked from its leaves to its
    root. `shared`: tokens that each of the sorted samples shares with the next.
    """
    path = [_Node(0, 0)]
    for place, depth in enumerate([*shared, 0]):
        node = _Node(place, 0, place + 1, least[place])
        while path[-1].depth > depth:
            path[-1].add(node)
            node = path.pop()
            node.close()
        if path[-1].depth < depth:
            path.append(_Node(node.begin, depth))
        path[-1].add(node)
    groups, nodes = [], path[0].children or []
    while nodes:
        node = nodes.pop()
        if node.children is not None:
            nodes.extend(node.children)
        elif node.end - node.begin > 1:
            groups.append(node)
    return groups
