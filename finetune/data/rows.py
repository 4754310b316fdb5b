"""Sources of a recipe to samples, split into training, validation and test rows."""

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.common.errors import DataError
from finetune.common.registry import load_part, part_names
from finetune.data.media import Limits
from finetune.data.sample import Medium, Row, Sample, media_key

SHOWN = 10  # errors listed at once


@dataclass(frozen=True)
class Source:
    """One file or folder of rows with the task it is read for. `task`, `format`: (kind, Options), no format: detected;
    `head`: likewise, what its answers are read off; `name`: what its scores are called; `group`: the column whose equal
    rows are held out together. What else rows may name as media: files `outside_media_folder`, addresses of `hosts`;
    `max_bytes`: of what is fetched or held by a row itself.
    """

    path: Path
    task: tuple[str, Any]
    format: tuple[str, Any] | None = None
    split: str = "train"
    hold_out: float = 0.0
    weight: float = 1.0
    columns: Mapping[str, str] | None = None
    media_folder: Path | None = None
    name: str | None = None
    head: tuple[str, Any] = ("language", None)
    loss_weight: float = 1.0
    hold_out_validation: float = 0.0
    group: str | None = None
    outside_media_folder: bool = False
    hosts: tuple[str, ...] = ()
    max_bytes: int = Limits.max_bytes


@dataclass(frozen=True)
class Entry:
    """A sample, the number of its source, and its weight."""

    sample: Sample
    source: int
    weight: float


def read_rows(source: Source) -> Iterator[Row]:
    """The rows of one source, one at a time, its columns renamed as the recipe says. Raises DataError."""
    kind, options = source.format or detected(source.path)
    folder = source.media_folder or (source.path if source.path.is_dir() else source.path.parent)
    renamed = source.columns or {}
    for number, columns in load_part("formats", kind).rows(source.path, options):
        columns = columns | {ours: columns[theirs] for ours, theirs in renamed.items() if theirs in columns}
        yield Row(
            source.path, number, columns, folder, source.outside_media_folder, source.hosts, max_bytes=source.max_bytes
        )


def detected(path: Path) -> tuple[str, Any]:
    """The format of a file or folder, as (kind, Options). Raises DataError where none, or more than one, recognises
    it.
    """
    names = part_names("formats")
    found = [name for name in names if load_part("formats", name).detects(path)]
    if not found:
        raise DataError(f"{path}: no format recognises it; name one with `data.N.format` ({', '.join(names)})")
    if len(found) > 1:
        raise DataError(f"{path}: could be {' or '.join(found)}; name one with `data.N.format`")
    return found[0], load_part("formats", found[0]).Options()


def read_samples(source: Source) -> list[tuple[Sample, str]]:
    """All samples of one source, each with what it is held out by: '' for its own content. Raises DataError with up to
    ten wrong rows, and the number of all.
    """
    kind, options = source.task
    task = load_part("tasks", kind)
    samples: list[tuple[Sample, str]] = []
    wrong: list[str] = []
    for row in read_rows(source):
        try:
            samples.append((task.sample(row, options), group_of(row, source)))
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        raise DataError(listed(wrong, f"{source.path}: {len(wrong)} of {len(wrong) + len(samples)} rows can't be used"))
    if not samples:
        raise DataError(f"{source.path}: no rows")
    return samples


def read_splits(sources: Sequence[Source], seed: int) -> dict[str, list[Entry]]:
    """{"train": ..., "validation": ..., "test": ...}.

    `hold_out` moves rows from training to test by the hash of their group, first medium or text, so that the same
    picture never stands on both sides; those of the next higher chances are for validation. Raises DataError where a
    row of training stands in another split too.
    """
    splits: dict[str, list[Entry]] = {"train": [], "validation": [], "test": []}
    for number, source in enumerate(sources):
        for sample, group in read_samples(source):
            splits[split_of(sample, group, source, seed)].append(Entry(sample, number, source.weight))
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


def split_of(sample: Sample, group: str, source: Source, seed: int, key: Callable[[Medium], str] = media_key) -> str:
    """What a row is for. `group`: as `group_of` gives it; `key`: of a medium's content, `media_key` or equal to it."""
    chance = _chance(sample, group, seed, key) if source.split == "train" else 1.0
    if chance < source.hold_out:
        return "test"
    return "validation" if chance < source.hold_out + source.hold_out_validation else source.split


def some(entries: Sequence[Entry], limit: int | None, seed: int) -> list[Entry]:
    """At most `limit` rows, drawn by chance: files are often sorted. In the file's order, and groups whole."""
    if limit is None or limit >= len(entries):
        return list(entries)
    together: dict[Any, list[int]] = defaultdict(list)
    for number, entry in enumerate(entries):
        together[(entry.source, entry.sample.group) if entry.sample.group else number].append(number)
    groups = list(together.values())
    random.Random(seed).shuffle(groups)
    chosen: list[int] = []
    for group in groups:
        if len(chosen) + len(group) <= limit or not chosen:
            chosen += group
    return [entries[i] for i in sorted(chosen[:limit])]


def mixed(entries: Sequence[Entry], temperature: float) -> list[float]:
    """How often each row is seen in an epoch: its weight, and with a temperature above 1 a factor that makes a source
    of n rows weigh n^(1 / temperature) (Arivazhagan et al. 2019, https://arxiv.org/abs/1907.05019). The sum stays.
    """
    rows: dict[int, float] = defaultdict(float)
    for entry in entries:
        rows[entry.source] += entry.weight
    wanted = {source: count ** (1 / temperature) for source, count in rows.items()}
    scale = sum(rows.values()) / sum(wanted.values())
    return [entry.weight * scale * wanted[entry.source] / rows[entry.source] for entry in entries]


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


def group_of(row: Row, source: Source) -> str:
    """What is held out together, '' where the source names no column for it. Raises DataError where a row has none."""
    if source.group is None:
        return ""
    value = row.columns.get(source.group)
    if value in (None, ""):
        raise DataError(f"{row.where}: column {source.group!r}, by which rows are held out, is empty or missing")
    return str(value)


def _chance(sample: Sample, group: str, seed: int, key: Callable[[Medium], str]) -> float:
    """A number in [0, 1) that only depends on the seed and the row's group, or its first medium, or its question."""
    group = group or sample.group
    content = group or (key(sample.media[0]) if sample.media else str(sample.question))
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
