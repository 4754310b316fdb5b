"""Which rows are for training, validation and test: exact shares, and nothing that belongs together in two splits."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from hashlib import sha256

from finetune.data.sample import Message, Sample
from finetune.recipe.schema import Source

SPLITS = ("train", "validation", "test")


def assigned(keys: Sequence[Sequence[str]], labels: Sequence[str], shares: Mapping[str, float], seed: int) -> list[str]:
    """The split of each row. Rows that share one of the `keys` stay together; `labels` are spread evenly. Splits are
    filled in the order of `shares`, each to its share of the rows; the first has the rest.
    """
    strata: dict[str, list[list[int]]] = defaultdict(list)
    for rows in connected(keys):
        counts = Counter(labels[row] for row in rows)
        strata[min(counts, key=lambda label: (-counts[label], label))].append(rows)
    result = [""] * len(keys)
    owed = dict.fromkeys(shares, 0.0)  # rows that earlier labels fell short by: else small ones would all round down
    rest, *filling = [split for split, share in shares.items() if share]
    for label in sorted(strata):
        within = sorted(strata[label], key=lambda rows: _chance(min(key for row in rows for key in keys[row]), seed))
        total = sum(map(len, within))
        wanted = {split: shares[split] * total + owed[split] for split in shares}
        taken = dict.fromkeys(shares, 0)
        for rows in within:
            # Fill a split as long as it comes nearer to its share.
            split = next((s for s in filling if taken[s] + len(rows) / 2 <= wanted[s]), rest)
            taken[split] += len(rows)
            for row in rows:
                result[row] = split
        owed = {split: wanted[split] - taken[split] for split in shares}
    return result


def connected(keys: Sequence[Sequence[str]]) -> list[list[int]]:
    """Sets of row numbers: rows that share a key, directly or through others, are in one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first: dict[str, int] = {}
    edges = [(row, first.setdefault(key, row)) for row, row_keys in enumerate(keys) for key in row_keys]
    if not edges:
        return []
    graph = coo_array(([True] * len(edges), tuple(zip(*edges, strict=True))), shape=(len(keys), len(keys)))
    sets: dict[int, list[int]] = defaultdict(list)
    for row, number in enumerate(connected_components(graph, directed=False)[1].tolist()):
        sets[number].append(row)
    return list(sets.values())


def _chance(key: str, seed: int) -> str:
    return sha256(f"{seed}/{key}".encode()).hexdigest()


def keys_of(sample: Sample, group: str = "") -> list[str]:
    """What a row shares with those that it stays together with: media, groups, and without media its question. An item
    of a ranking stays with its groups alone: groups rank the same items. `group`: from `group_of`.
    """
    groups = [f"group {name}" for name in dict.fromkeys((group, sample.group)) if name]
    if sample.group:
        return groups
    keys = [f"medium {medium.key}" for medium in dict.fromkeys(sample.media)]
    keys = keys or [f"question {content_key(sample.question).hex()}"]
    return keys + groups


def splits_of(keys: Sequence[Sequence[str]], numbers: Sequence[int], sources: Sequence[Source], seed: int) -> list[str]:
    """The split of each row. `keys`: from `keys_of`; `numbers`: of the rows' sources.

    Sources with the same shares are split together, so that a medium or group of several is on one side; each holds out
    its share, to within a row or the largest set of rows that stay together.
    """
    result: list[str] = [sources[number].split for number in numbers]
    by_shares: dict[tuple[float, float], list[int]] = defaultdict(list)
    for row, number in enumerate(numbers):
        source = sources[number]
        if holds_out(source):
            by_shares[source.hold_out, source.hold_out_validation].append(row)
    for (test, validation), rows in by_shares.items():
        shares = {"train": max(0.0, 1 - test - validation), "test": test, "validation": validation}
        labels = [f"{numbers[row]:06}" for row in rows]
        for row, split in zip(rows, assigned([keys[row] for row in rows], labels, shares, seed), strict=True):
            result[row] = split
    return result


def holds_out(source: Source) -> bool:
    return source.split == "train" and source.hold_out + source.hold_out_validation > 0


def sample_key(sample: Sample) -> bytes:
    """16 bytes, equal for rows of the same content, and in a ranking of the same group."""
    key = content_key(sample.messages)
    return sha256(key + sample.group.encode()).digest()[:16] if sample.group else key


def content_key(messages: Sequence[Message]) -> bytes:
    """16 bytes, equal for messages with the same text and media, whatever the files are called."""
    digest = sha256()
    for message in messages:
        for part in (message.role, *message.content):
            content = (part if isinstance(part, str) else part.key).encode()
            digest.update(len(content).to_bytes(8, "big") + content)
    return digest.digest()[:16]
