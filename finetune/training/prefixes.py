"""What training samples begin with in common, tokens and media: a row needs it only once, as their prefix."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from finetune.model.prefixes import IGNORED, most_shared, shared_tokens
from finetune.training.pack import LEAST_TOKENS, MOST_BRANCHES, Sharing
from finetune.training.samples import TokenizedSamples

Numbers: TypeAlias = npt.NDArray[Any]
LEAST_SAVED = 0.1  # of a group's tokens; below that, and below LEAST_TOKENS, samples are left to be shuffled freely


def sharing_of(samples: TokenizedSamples, media_in_prefix: bool = False, whole_prompts: bool = False) -> Sharing:
    """Groups of samples such that rows save most tokens, if each sample is in one group. `media_in_prefix`: only where
    all media of a group stand in its prefix; `whole_prompts`: only where all of its prompts do.
    """
    keys = _beginnings(samples)
    order = sorted(range(len(keys)), key=keys.__getitem__)
    shared = [_equal_bytes(keys[one], keys[other]) // 4 for one, other in pairwise(order)]
    needed = [0] * len(keys)
    if media_in_prefix:
        ends = samples.column("media_ends")
        needed = [max(ends[number], default=0) for number in order]
    if whole_prompts:
        prompts = _prompts(samples)
        needed = [max(least, int(prompts[number])) for least, number in zip(needed, order, strict=True)]
    lengths = samples.taught_lengths
    group, saved = list(range(len(keys))), [0] * len(keys)
    del keys
    for span in _best_groups(shared, needed):
        members = [order[place] for place in range(span.begin, span.end)]
        tokens = min(span.depth, _shared_by_teachers(samples, members))
        least = LEAST_SAVED * sum(lengths[number] for number in members)
        if tokens < LEAST_TOKENS or tokens * _spared(len(members)) < least:
            continue
        for number in members:
            group[number], saved[number] = members[0], tokens
    return Sharing(group, saved)


def _spared(count: int) -> int:
    """How many of so many samples find their prefix in the row."""
    return count - -(-count // MOST_BRANCHES)


def _beginnings(samples: TokenizedSamples) -> list[bytes]:
    """What may stand in a prefix of each sample: token ids and, in the place of a medium's, its number. Big-endian, so
    that bytes sort as they do.
    """
    most = _most_shared(samples)
    ids, ends = _flat(samples, "input_ids")
    ids = ids.astype(">u4")
    begins, stops, numbers, owners = _media(samples)
    cut = (begins < most[owners]) & (most[owners] < stops)
    most[owners[cut]] = begins[cut]
    starts, sizes = ends[:-1], stops - begins
    places = np.repeat(starts[owners] + begins - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
    ids[places] = np.repeat(2**31 + numbers.astype(np.int64), sizes)
    content = ids.view(np.uint8).data
    spans = zip((4 * starts).tolist(), (4 * (starts + most)).tolist(), strict=True)
    return [bytes(content[begin:end]) for begin, end in spans]


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


def _most_shared(samples: TokenizedSamples) -> Numbers:
    """`most_shared` of each sample's labels."""
    sizes = pc.list_value_length(samples.arrow("labels")).to_numpy()
    most: Numbers = np.minimum(_prompts(samples), sizes - 1)
    return most


def _media(samples: TokenizedSamples) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """(where each medium of all samples begins, and ends; its number, equal for equal media; that of its sample)"""
    begins, ends = _flat(samples, "media_begins")
    owners = np.repeat(np.arange(len(samples)), np.diff(ends))
    kinds, keys = (pc.list_flatten(samples.arrow(name)) for name in ("media_kinds", "media_keys"))
    names = pc.binary_join_element_wise(kinds, keys, " ").combine_chunks()
    numbers = names.dictionary_encode().indices.to_numpy()
    return begins, _flat(samples, "media_ends")[0], numbers, owners


def _equal_bytes(one: bytes, other: bytes) -> int:
    """With how many equal bytes both begin."""
    count = min(len(one), len(other))
    different = np.flatnonzero(np.frombuffer(one, np.uint8, count) != np.frombuffer(other, np.uint8, count))
    return int(different[0]) if len(different) else count


def _shared_by_teachers(samples: TokenizedSamples, members: Sequence[int]) -> int:
    """Tokens with which the rows of the teacher begin; without a teacher there is no limit."""
    teachers = samples.arrow("teacher_input_ids")
    if any(not teachers[number].is_valid for number in members):
        return 2**31
    rows = [samples[number] for number in members]
    most = min(most_shared(row.teacher_labels or ()) for row in rows)
    return shared_tokens([row.teacher_input_ids or () for row in rows], most)


@dataclass(slots=True)
class _Node:
    """Sorted samples [begin, end) that share `depth` tokens, and may only stand behind a prefix of at least `least`.
    `saved`: tokens that their best division into groups saves, which is this one group, or that of its children.
    """

    begin: int
    depth: int
    end: int = 0
    least: int = 0
    saved: int = 0
    children: list["_Node"] | None = None

    def add(self, child: "_Node") -> None:
        self.children = self.children or []
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
        if node.children:
            nodes.extend(node.children)
        elif node.end - node.begin > 1:
            groups.append(node)
    return groups
