"""What training samples begin with in common, tokens and media: a row needs it only once, as their prefix."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from finetune.model.prefixes import most_shared, shared_tokens
from finetune.training.pack import LEAST_TOKENS, MOST_BRANCHES, Sharing
from finetune.training.samples import TokenizedSamples

LEAST_SAVED = 0.1  # of a group's tokens; below that, and below LEAST_TOKENS, samples are left to be shuffled freely


def sharing_of(samples: TokenizedSamples, media_in_prefix: bool = False) -> Sharing:
    """Groups of samples such that rows save most tokens, if each sample is in one group. `media_in_prefix`: only where
    all media of a group stand in its prefix.
    """
    keys = [key.tobytes() for key in _beginnings(samples)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    shared = [_equal_bytes(keys[one], keys[other]) // 4 for one, other in pairwise(order)]
    ends = samples.column("media_ends")
    needed = [max(ends[number], default=0) if media_in_prefix else 0 for number in order]
    lengths = samples.taught_lengths
    group, saved = list(range(len(keys))), [0] * len(keys)
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


def _beginnings(samples: TokenizedSamples) -> Iterable[npt.NDArray[np.uint32]]:
    """What may stand in a prefix of each sample: token ids and, in the place of a medium's, its number. Big-endian, so
    that bytes sort as they do.
    """
    names = ("input_ids", "labels", "media_kinds", "media_keys", "media_begins", "media_ends")
    numbers: dict[tuple[str, str], int] = {}
    for ids, labels, kinds, keys, begins, ends in zip(*(samples.column(name) for name in names), strict=True):
        most = most_shared(labels)
        row = np.array(ids, dtype=">u4")
        for kind, key, begin, end in zip(kinds, keys, begins, ends, strict=True):
            row[begin:end] = 2**31 + numbers.setdefault((kind, key), len(numbers))
            if begin < most < end:
                most = begin
        yield row[:most]


def _equal_bytes(one: bytes, other: bytes) -> int:
    """With how many equal bytes both begin."""
    count = min(len(one), len(other))
    different = np.flatnonzero(np.frombuffer(one, np.uint8, count) != np.frombuffer(other, np.uint8, count))
    return int(different[0]) if len(different) else count


def _shared_by_teachers(samples: TokenizedSamples, members: Sequence[int]) -> int:
    """Tokens with which the rows of the teacher begin; without a teacher there is no limit."""
    rows = [samples[number] for number in members]
    if any(row.teacher_input_ids is None for row in rows):
        return 2**31
    most = min(most_shared(row.teacher_labels or ()) for row in rows)
    return shared_tokens([row.teacher_input_ids or () for row in rows], most)


@dataclass
class _Node:
    """Sorted samples [begin, end) that share `depth` tokens, and may only stand behind a prefix of at least `least`.
    `saved`: tokens that their best division into groups saves, which is this one group, or that of its children.
    """

    begin: int
    depth: int
    end: int = 0
    least: int = 0
    saved: int = 0
    children: list["_Node"] = field(default_factory=list)

    def add(self, child: "_Node") -> None:
        self.children.append(child)
        self.saved += child.saved
        self.end = child.end
        self.least = max(self.least, child.least)

    def close(self) -> None:
        together = self.depth * _spared(self.end - self.begin)
        if self.depth >= self.least and together > self.saved:
            self.saved, self.children = together, []


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
    groups, nodes = [], path[0].children
    while nodes:
        node = nodes.pop()
        if node.children:
            nodes.extend(node.children)
        elif node.end - node.begin > 1:
            groups.append(node)
    return groups
