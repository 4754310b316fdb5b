"""Samples in an Arrow table: each is made anew when it is asked for, so that memory doesn't grow with them."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from finetune.common.kept_tables import BATCH, taken
from finetune.data.hold_out import sample_key
from finetune.data.media_index import Stamp
from finetune.data.sample import Medium, Message, Sample

# `media`: "image", a space and the key of each medium; `files`: where they are, and `stamps` three numbers of each.
# `key`: `hold_out.sample_key`; `stays`: `hold_out.keys_of`. Names of files may be of any bytes.
SCHEMA = pa.schema(
    {
        "where": pa.binary(),
        "source": pa.int32(),
        "answer": pa.large_string(),
        "media": pa.list_(pa.string()),
        "files": pa.list_(pa.binary()),
        "stamps": pa.list_(pa.int64()),
        "key": pa.binary(16),
        "stays": pa.list_(pa.string()),
        "sample": pa.large_string(),  # large: all of them together may have more than 2 GiB
    }
)
Numbers = npt.NDArray[np.integer[Any]]


def columns_of(sample: Sample, source: int, stays: Sequence[str]) -> dict[str, object]:
    """A sample of this source as a row of the table. Raises OSError where a medium is gone."""
    files = [medium.link or str(medium.path) for medium in sample.media]
    stamps = [number for file in files for number in Stamp.of(file)]  # before the files are read
    return {
        "where": _bytes(sample.where),
        "source": source,
        "answer": sample.answer,
        "media": [f"{medium.kind} {medium.key}" for medium in sample.media],
        "files": [_bytes(file) for file in files],
        "stamps": stamps,
        "key": sample_key(sample),
        "stays": list(stays),
        "sample": json.dumps(
            [
                sample.group,
                sample.target,
                [[m.role, _parts(m)] for m in sample.messages],
                sample.rejected,
                sample.desirable,
            ]
        ),
    }


def _parts(message: Message) -> list[object]:
    return [
        part if isinstance(part, str) else (part.kind, str(part.path), part.text, part.known_key or part.key, part.link)
        for part in message.content
    ]


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


class SampleTable(Sequence[Sample]):
    """`tasks`, `weights`: of each source. `numbers`: the rows of the table that these samples are; None: all."""

    def __init__(
        self, table: pa.Table, tasks: Sequence[str], weights: Sequence[float], numbers: Numbers | None = None
    ) -> None:
        self.table, self.tasks, self.weights = table, tuple(tasks), tuple(weights)
        self.numbers = np.arange(table.num_rows, dtype=np.int32) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, number: int) -> Sample: ...

    @overload
    def __getitem__(self, number: slice) -> "SampleTable": ...

    def __getitem__(self, number: int | slice) -> "Sample | SampleTable":
        if isinstance(number, slice):
            return self.at(self.numbers[number])
        place = int(self.numbers[number])
        where, source, text = (self.table.column(name)[place].as_py() for name in ("where", "source", "sample"))
        return self._sample(where, source, text)

    def __iter__(self) -> Iterator[Sample]:
        columns = map(self.each, ("where", "source", "sample"))
        for where, source, text in zip(*columns, strict=True):
            yield self._sample(where, source, text)

    def _sample(self, where: bytes, source: int, text: str) -> Sample:
        place = where.decode("utf-8", "surrogateescape")
        group, target, messages, rejected, desirable = json.loads(text)
        turns = tuple(
            Message(
                role,
                tuple(
                    part
                    if isinstance(part, str)
                    else Medium(part[0], Path(part[1]), part[2], place, known_key=part[3], link=part[4])
                    for part in parts
                ),
            )
            for role, parts in messages
        )
        task, weight = self.tasks[source], self.weights[source]
        return Sample(turns, place, task, target, group, source, weight, rejected, desirable)

    def at(self, numbers: Numbers) -> "SampleTable":
        """The samples in these rows of the table."""
        return SampleTable(self.table, self.tasks, self.weights, numbers)

    def select(self, chosen: npt.NDArray[Any] | Sequence[int]) -> "SampleTable":
        """The samples of these numbers, or where a mask is true."""
        return self.at(self.numbers[np.asarray(chosen)] if len(chosen) else self.numbers[:0])

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of `SCHEMA`, a value for each sample."""
        return taken(self.table.column(name), self.numbers)

    def each(self, name: str) -> Iterator[Any]:
        """The values of a column, a few of which are in memory at a time."""
        for start in range(0, len(self), BATCH):
            yield from taken(self.table.column(name), self.numbers[start : start + BATCH]).to_pylist()

    @property
    def sources(self) -> npt.NDArray[np.int32]:
        """The number of each sample's source."""
        result: npt.NDArray[np.int32] = self.column("source").to_numpy()
        return result

    @property
    def wheres(self) -> Iterator[str]:
        return (where.decode("utf-8", "surrogateescape") for where in self.each("where"))

    def answers(self, most: int) -> tuple[int, Counter[str]]:
        """(how many answers differ, {answer: number of samples} in the order in which they come, where these are no
        more than `most`).
        """
        counts: Counter[str] = Counter()

        def hashes() -> Iterator[int]:
            for answer in self.each("answer"):
                if len(counts) <= most:
                    counts[answer] += 1
                yield hash(answer)

        different = len(np.unique(np.fromiter(hashes(), np.int64, len(self))))  # texts would take far more room
        return different, counts if different <= most else Counter()

    def with_keys(self, keys: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Which of the samples have one of these keys."""
        result = pc.is_in(self.column("key"), value_set=pa.array(keys, pa.binary(16)))
        return np.asarray(result.to_numpy(), dtype=bool)

    def count_media(self) -> int:
        """Of all samples, those in several of them counted each time."""
        counts = pc.list_value_length(self.table.column("media"))
        return int(pc.sum(taken(counts, self.numbers)).as_py() or 0)

    def digest(self) -> str:
        """SHA-256 of the samples, hexadecimal."""
        digest = hashlib.sha256(json.dumps([self.tasks, self.weights]).encode())
        for batch in self.table.select(["where", "source", "sample"]).to_batches():
            digest.update(batch.serialize())
        digest.update(self.numbers.tobytes())
        return digest.hexdigest()

    def kinds(self) -> Counter[str]:
        """{kind: how many media}, in the order in which they come."""
        return Counter(name.partition(" ")[0] for names in self.each("media") for name in names)

    def media_keys(self) -> Iterator[tuple[str, str]]:
        """(kind, key) of all media, each content once."""
        names = dict.fromkeys(name for names in self.each("media") for name in names)
        for name in names:
            kind, _, key = name.partition(" ")
            yield kind, key

    def different_media(self, known: Callable[[str, str], bool]) -> Iterator[Medium]:
        """Media of which `known(kind, key)` isn't true, each content once."""
        seen: set[str] = set()
        for number, names in enumerate(self.each("media")):
            unknown = [name for name in names if name not in seen and not known(*name.split(" "))]
            if unknown:
                seen.update(unknown)
                media = {f"{medium.kind} {medium.key}": medium for medium in self[number].media}
                yield from (media[name] for name in dict.fromkeys(unknown))


def unchanged(table: pa.Table) -> bool:
    """Whether the media of samples are the files that they were."""
    for batch in table.select(["files", "stamps"]).to_batches():
        files, stamps = (batch.column(name).flatten() for name in ("files", "stamps"))
        expected = zip(*(stamps.to_numpy()[start::3].tolist() for start in range(3)), strict=True)
        for file, stamp in zip(files.to_pylist(), expected, strict=True):
            try:
                if Stamp.of(file.decode("utf-8", "surrogateescape")) != stamp:
                    return False
            except OSError:
                return False
    return True


def newest(table: pa.Table) -> int:
    """When the last of the media was changed, in nanoseconds since 1970; 0 without media."""
    latest = 0
    for batch in table.select(["stamps"]).to_batches():
        times = batch.column("stamps").flatten().to_numpy()[1::3]
        latest = max(latest, int(times.max(initial=0)))
    return latest
