"""What several samples or prompts begin with in common: tokens and media that need to be computed only once."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

IGNORED = -100  # label of a token that isn't learned


class Beginning(NamedTuple):
    """`input_ids`, of which `most` may be shared; its media, equal if they're the same, with the places in `input_ids`
    where each begins and ends.
    """

    input_ids: Sequence[int]
    most: int
    media: Sequence[Hashable]
    begins: Sequence[int]
    ends: Sequence[int]


def prompt_tokens(labels: Sequence[int]) -> int:
    """Tokens of a sample before the first that is learned."""
    return next((place for place, label in enumerate(labels) if place and label != IGNORED), len(labels))


def most_shared(labels: Sequence[int]) -> int:
    """Tokens that a sample may have in its prefix: those of its prompt, and not all of a sample."""
    return min(prompt_tokens(labels), len(labels) - 1)


def shared_tokens(rows: Sequence[Sequence[int]], most: int) -> int:
    """With how many equal tokens all of some rows begin, at most `most`."""
    for other in rows[1:]:
        pairs = enumerate(zip(rows[0][:most], other, strict=False))
        most = next((place for place, (one, two) in pairs if one != two), min(most, len(other)))
    return most


def shared_beginning(beginnings: Sequence[Beginning]) -> int:
    """As many tokens can stand in a prefix before all of some samples: equal ones, with equal media, none cut."""
    first, *others = beginnings
    count = shared_tokens([one.input_ids for one in beginnings], min(one.most for one in beginnings))
    for place, (begin, end) in enumerate(zip(first.begins, first.ends, strict=True)):
        equal = all(list(other.media[place : place + 1]) == [first.media[place]] for other in others)
        if begin < count and (count < end or not equal):
            return begin
    return count
