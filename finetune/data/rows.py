"""Sources of a recipe to samples, split into training, validation and test rows."""

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.features import media_key
from finetune.data.sample import Row, Sample
from finetune.errors import DataError
from finetune.parts import load_part, part_names

SHOWN = 10  # errors listed at once


@dataclass(frozen=True)
class Source:
    """One file of rows with the task it is read for. `task`: (kind, Options); `name`: what its scores are called."""

    path: Path
    task: tuple[str, Any]
    format: str | None = None
    split: str = "train"
    hold_out: float = 0.0
    weight: float = 1.0
    columns: Mapping[str, str] | None = None
    media_folder: Path | None = None
    name: str | None = None


@dataclass(frozen=True)
class Entry:
    """A sample, the number of its source, and its weight."""

    sample: Sample
    source: int
    weight: float


def read_rows(source: Source) -> Iterator[Row]:
    """The rows of one file, its columns renamed as the recipe says. Raises DataError."""
    names = part_names("data.formats")
    format_name = source.format or next((n for n in names if load_part("data.formats", n).detects(source.path)), None)
    if format_name is None:
        raise DataError(f"{source.path}: no format recognises it; name one with `data.N.format` ({', '.join(names)})")
    folder = source.media_folder or source.path.parent
    renamed = source.columns or {}
    for number, columns in load_part("data.formats", format_name).rows(source.path):
        columns = columns | {ours: columns[theirs] for ours, theirs in renamed.items() if theirs in columns}
        yield Row(source.path, number, columns, folder)


def read_samples(source: Source) -> list[Sample]:
    """All samples of one file. Raises DataError with up to ten wrong rows, and the number of all."""
    kind, options = source.task
    task = load_part("tasks", kind)
    samples: list[Sample] = []
    wrong: list[str] = []
    for row in read_rows(source):
        try:
            samples.append(task.sample(row, options))
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        raise DataError(listed(wrong, f"{source.path}: {len(wrong)} of {len(wrong) + len(samples)} rows can't be used"))
    if not samples:
        raise DataError(f"{source.path}: no rows")
    return samples


def read_splits(sources: Sequence[Source], seed: int) -> dict[str, list[Entry]]:
    """{"train": ..., "validation": ..., "test": ...}.

    `hold_out` moves rows from training to test by the hash of their first medium (or text), so that the same picture
    never stands on both sides. Raises DataError where a row of training stands in another split too.
    """
    splits: dict[str, list[Entry]] = {"train": [], "validation": [], "test": []}
    for number, source in enumerate(sources):
        for sample in read_samples(source):
            held_out = source.split == "train" and _chance(sample, seed) < source.hold_out
            splits["test" if held_out else source.split].append(Entry(sample, number, source.weight))
    training = {content_key(entry.sample): entry.sample.where for entry in splits["train"]}
    for split in ("validation", "test"):
        twice = [
            f"{training[key]} is also {entry.sample.where}"
            for entry in splits[split]
            if (key := content_key(entry.sample)) in training
        ]
        if twice:
            raise DataError(listed(twice, f"{len(twice)} rows stand both in training and in {split}"))
    return splits


def some(entries: Sequence[Entry], limit: int | None, seed: int) -> list[Entry]:
    """At most `limit` rows, drawn by chance: files are often sorted. In the file's order."""
    if limit is None or limit >= len(entries):
        return list(entries)
    return [entries[i] for i in sorted(random.Random(seed).sample(range(len(entries)), limit))]


def listed(lines: Sequence[str], headline: str) -> str:
    more = f"\n  ... and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return f"{headline}:\n  " + "\n  ".join(lines[:SHOWN]) + more


def content_key(sample: Sample) -> str:
    """A hash of what a row says and shows, whatever its files are called."""
    digest = hashlib.sha256()
    media = iter(sample.media)
    for message in sample.messages:
        digest.update(message.role.encode())
        for part in message.content:
            digest.update(part.encode() if isinstance(part, str) else media_key(next(media)).encode())
    return digest.hexdigest()


def _chance(sample: Sample, seed: int) -> float:
    """A number in [0, 1) that only depends on the seed and the row's first medium, or its question."""
    content = media_key(sample.media[0]) if sample.media else str(sample.question)
    return int(hashlib.sha256(f"{seed}/{content}".encode()).hexdigest()[:12], 16) / 16**12


def summary(splits: Mapping[str, Sequence[Entry]]) -> dict[str, Any]:
    """Counts for the run folder: rows and media per split, the most frequent answers."""
    result: dict[str, Any] = {}
    for split, entries in splits.items():
        answers: dict[str, int] = defaultdict(int)
        for entry in entries:
            answers[entry.sample.answer] += 1
        frequent = sorted(answers.items(), key=lambda item: -item[1])[:20]
        result[split] = {
            "rows": len(entries),
            "media": sum(len(entry.sample.media) for entry in entries),
            "different_answers": len(answers),
            "answers": dict(frequent) if len(answers) <= 100 else {},
        }
    return result
