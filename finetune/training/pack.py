"""Samples packed whole into rows of a fixed number of tokens: no padding, nothing cut."""

import random
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import ceil
from typing import overload

from finetune.common.errors import DataError

LEAST_TOKENS = 16  # of a prefix
MOST_BRANCHES = 16  # samples behind one prefix, so that a step still sees many media
Row = list[list[int]]  # groups of samples: those of a group share their beginning


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Rows in three arrays of int32, since those of all epochs are many: `samples` of all of them, one after another;
    where in `samples` each group ends, behind a 0, and where in these `groups` each row ends, behind a 0.
    """

    samples: "array[int]" = field(default_factory=lambda: array("i"))
    groups: "array[int]" = field(default_factory=lambda: array("i", [0]))
    ends: "array[int]" = field(default_factory=lambda: array("i", [0]))

    @classmethod
    def of(cls, rows: Iterable[Iterable[Iterable[int]]]) -> "Rows":
        result = cls()
        for row in rows:
            result.append(row)
        return result

    def append(self, row: Iterable[Iterable[int]]) -> None:
        for group in row:
            self.samples.extend(group)
            self.groups.append(len(self.samples))
        self.ends.append(len(self.groups) - 1)

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, number: int) -> Row: ...

    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...

    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        number = range(len(self))[number]
        begin, end = self.ends[number], self.ends[number + 1]
        return [self.samples[self.groups[n] : self.groups[n + 1]].tolist() for n in range(begin, end)]


@dataclass(frozen=True)
class Sharing:
    """For each sample, the number of its group, samples that share their beginning, and `saved`, the tokens that a row
    saves for each but one of a group that stand in it together; 0 where it shares nothing.
    """

    group: Sequence[int]
    saved: Sequence[int]

    def together(self, samples: Iterable[int]) -> Row:
        """Samples by their groups."""
        groups: dict[int, list[int]] = {}
        for sample in samples:
            groups.setdefault(self.group[sample], []).append(sample)
        return list(groups.values())

    def tokens(self, group: Sequence[int], lengths: Sequence[int]) -> int:
        """Tokens of samples of one group that stand in a row together."""
        return sum(lengths[sample] for sample in group) - self.saved[group[0]] * (len(group) - 1)

    @classmethod
    def none(cls, count: int) -> "Sharing":
        return cls(range(count), bytes(count))


def pack(
    lengths: Sequence[int],
    capacity: int,
    order: Sequence[int],
    apart: Sequence[int] | None = None,
    mean: int | None = None,
) -> list[list[int]]:
    """First fit over a few open rows, in the given order of samples -> rows of sample numbers.

    `lengths` in tokens, `capacity` in tokens of a row. `apart`: tokens of each if nothing were shared, of which rows
    hold `mean` on average, and of open rows the one with the fewest takes a sample. Raises DataError where a sample is
    longer than a row.
    """
    shared, mean = apart is not None, mean or capacity
    apart = apart or lengths
    open_rows: list[tuple[int, int, list[int]]] = []  # (tokens free, tokens if nothing were shared, samples)
    rows: list[list[int]] = []
    lacking = 0  # of all rows, if nothing were shared
    for sample in order:
        need, alone = lengths[sample], apart[sample]
        if need > capacity:
            raise DataError(f"sample {sample} has {need} tokens: more than tokens_per_batch ({capacity})")
        fitting = (place for place, (free, *_) in enumerate(open_rows) if need <= free)
        place = min(fitting, key=lambda place: open_rows[place][1], default=None) if shared else next(fitting, None)
        if place is not None and alone <= 2 * lacking:  # nearer to the mean with the sample than without it
            free, held, row = open_rows[place]
            row.append(sample)
            open_rows[place] = (free - need, held + alone, row)
        else:
            row = [sample]
            rows.append(row)
            open_rows.append((capacity - need, alone, row))
            lacking = max(lacking, -mean // 2) + mean  # those behind a large group don't make up for all of it
            if len(open_rows) > 8:  # keep the order close to the shuffled one: the fullest row is closed
                open_rows.remove(min(open_rows, key=lambda entry: min(entry[0], mean - entry[1])))
        lacking -= alone
    return rows


def epoch_order(weights: Sequence[float], seed: int, epoch: int) -> "array[int]":
    """The samples of one epoch, shuffled. A weight of 2 is twice an epoch, 0.5 every other epoch on average."""
    generator = random.Random(f"{seed}/{epoch}")
    order = array("i")
    for sample, weight in enumerate(weights):
        whole = int(weight)
        order.extend([sample] * (whole + (generator.random() < weight - whole)))
    generator.shuffle(order)
    return order


def units(groups: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int, seed: int | str) -> list[list[int]]:
    """Groups that each fit a row: a larger one is split, in random order, into several."""
    fitting: list[list[int]] = []
    for number, group in enumerate(groups):
        samples = list(group)
        if sum(lengths[sample] for sample in group) > capacity:
            random.Random(f"{seed}/{number}").shuffle(samples)
        free = -1
        for sample in samples:
            if free < lengths[sample]:
                fitting.append([])
                free = capacity
            fitting[-1].append(sample)
            free -= lengths[sample]
    return fitting


def plan_rows(
    lengths: Sequence[int],
    weights: Sequence[float],
    *,
    capacity: int,
    epochs: int,
    seed: int,
    groups: Sequence[Sequence[int]] | None = None,
    sharing: Sharing | None = None,
) -> Rows:
    """The rows of all epochs of a stage, in the order in which they're trained. Samples of one of `groups` share a row,
    and the first one's weight; those that share their beginning stand together in it.
    """
    rows = Rows()
    sharing = sharing or Sharing.none(len(lengths))
    for epoch in range(epochs):
        whole = units(groups, lengths, capacity, f"{seed}/{epoch}") if groups else None
        order = epoch_order([weights[unit[0]] for unit in whole] if whole else weights, seed, epoch)
        pieces = gather((whole[number] if whole else [number] for number in order), lengths, sharing, capacity)
        # A row has as many samples as without sharing, on average, so that an epoch has as many steps; but a group that
        # alone would fill more than a row stays together, and is one.
        apart, mean = None, capacity
        if any(sharing.saved):
            sizes = [sum(lengths[sample] for sample in unit) for unit in whole] if whole else lengths
            apart, mean = pieces.apart, ceil(sum(pieces.apart) / max(len(pack(sizes, capacity, order)), 1))
        packed = pack(pieces.tokens, capacity, range(len(pieces.tokens)), apart, mean)
        samples, ends = pieces.in_order()
        for row in packed:
            parts = (samples[ends[piece] : ends[piece + 1]] for piece in row)
            rows.append(chain.from_iterable(sharing.together(part) for part in parts))
    return rows


@dataclass(frozen=True)
class Pieces:
    """Parts of rows: samples as they were drawn, and the number of each one's piece; of each piece its tokens, and its
    tokens if nothing were shared.
    """

    samples: "array[int]" = field(default_factory=lambda: array("i"))
    places: "array[int]" = field(default_factory=lambda: array("i"))
    tokens: "array[int]" = field(default_factory=lambda: array("q"))
    apart: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, unit: Sequence[int], place: int, tokens: int, apart: int) -> None:
        if place == len(self.tokens):
            self.tokens.append(0)
            self.apart.append(0)
        self.samples.extend(unit)
        self.places.extend([place] * len(unit))
        self.tokens[place] += tokens
        self.apart[place] += apart

    def in_order(self) -> tuple["array[int]", "array[int]"]:
        """(the samples of all pieces, one piece after another; where each piece begins, and their end)"""
        import numpy as np  # which a recipe is checked without

        samples, places = (np.frombuffer(numbers, np.int32) for numbers in (self.samples, self.places))
        ends = np.append(0, np.cumsum(np.bincount(places)))
        return array("i", samples[np.argsort(places, kind="stable")].tobytes()), array("q", ends.tobytes())


def gather(drawn: Iterable[Sequence[int]], lengths: Sequence[int], sharing: Sharing, capacity: int) -> Pieces:
    """Units in the order in which they were drawn -> parts of rows, where the first of those that share their beginning
    stood: all of them, or if they're more than MOST_BRANCHES, as many as a row would hold if nothing were shared.
    """
    sizes = Counter(group for group, saved in zip(sharing.group, sharing.saved, strict=True) if saved)
    pieces = Pieces()
    growing: dict[int, tuple[int, int]] = {}  # of a group: the piece that its next samples join, and how many it has
    for unit in drawn:
        groups = sharing.together(unit)
        number, saved = sharing.group[unit[0]], sharing.saved[unit[0]] if len(groups) == 1 else 0
        apart = sum(lengths[sample] for sample in unit)
        place, count = growing.get(number, (0, 0)) if saved else (0, 0)
        tokens = apart - saved * len(unit)  # behind the prefix that is there
        if count:
            whole = sizes[number] <= MOST_BRANCHES
            filled = pieces.tokens[place] + tokens if whole else pieces.apart[place] + apart
        if not count or count + len(unit) > MOST_BRANCHES or filled > capacity:
            place, count = len(pieces.tokens), 0
            tokens = sum(sharing.tokens(group, lengths) for group in groups)
        pieces.add(unit, place, tokens, apart)
        if saved:
            growing[number] = place, count + len(unit)
    return pieces
