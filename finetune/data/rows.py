"""The sources of a recipe as samples, split into training, validation and test."""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune.common.errors import DataError
from finetune.common.registry import load_part, part_names
from finetune.data.sample import Message, Row, Sample
from finetune.recipe.parts import FormatPart
from finetune.recipe.schema import Limits, RowFile, Source, task_names

SHOWN = 10  # errors listed at once


@dataclass(frozen=True)
class Splits:
    train: list[Sample] = field(default_factory=list)
    validation: list[Sample] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)

    def of(self, split: str) -> list[Sample]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


def read_rows(file: RowFile, max_bytes: int = Limits().max_bytes) -> Iterator[Row]:
    """The rows of one file or source, one at a time, columns renamed as the recipe says; `max_bytes` limits embedded
    and downloaded media. Raises DataError.
    """
    part = file.format or detected(file.path)
    folder, hosts = file.folder_of_media, tuple(file.hosts)
    for number, columns in part.module.rows(file.path, part.options):
        columns = columns | {ours: columns[theirs] for ours, theirs in file.columns.items() if theirs in columns}
        yield Row(file.path, number, columns, folder, file.outside_media_folder, hosts, max_bytes)


def detected(path: Path) -> FormatPart:
    """The format of a file or folder. Raises DataError where none, or more than one, recognises it."""
    kinds = part_names(FormatPart.folder)
    matching = [kind for kind in kinds if load_part(FormatPart.folder, kind).detects(path)]
    if not matching:
        raise DataError(f"{path}: no format recognises it; name one with `data.N.format` ({', '.join(kinds)})")
    if len(matching) > 1:
        raise DataError(f"{path}: could be {' or '.join(matching)}; name one with `data.N.format`")
    return FormatPart.of(matching[0])


def read_samples(source: Source, max_bytes: int = Limits().max_bytes) -> list[tuple[Sample, str]]:
    """All samples of one source, each with the group that it is held out with: '' for its own content. Raises DataError
    with up to ten wrong rows, and the number of all.
    """
    samples: list[tuple[Sample, str]] = []
    wrong: list[str] = []
    for row in read_rows(source, max_bytes):
        try:
            samples.append((source.task.sample(row), group_of(row, source)))
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        raise DataError(
            error_list(wrong, f"{source.path}: {len(wrong)} of {len(wrong) + len(samples)} rows can't be used")
        )
    if not samples:
        raise DataError(f"{source.path}: no rows")
    return samples


def read_splits(sources: Sequence[Source], seed: int, max_bytes: int = Limits().max_bytes) -> Splits:
    """All samples, each under the name of its task binding.

    `hold_out` moves rows from training to test by the hash of their group, first medium or text, so that the same
    picture is never on both sides; the next higher hashes are for validation. Raises DataError where a training row is
    also in another split.
    """
    splits = Splits()
    for number, (source, name) in enumerate(zip(sources, task_names(sources), strict=True)):
        for sample, group in read_samples(source, max_bytes):
            bound = replace(sample, task=name, source=number, weight=source.weight)
            splits.of(split_of(sample, group, source, seed)).append(bound)
    training = {content_key(sample.messages): sample.where for sample in splits.train}
    for split in ("validation", "test"):
        twice = [
            f"{training[key]} is also {sample.where}"
            for sample in splits.of(split)
            if (key := content_key(sample.messages)) in training
        ]
        if twice:
            raise DataError(error_list(twice, f"{len(twice)} rows are both in training and in {split}"))
    return splits


def split_of(sample: Sample, group: str, source: Source, seed: int) -> str:
    """What a row is for. `group`: from `group_of`."""
    chance = _chance(sample, group, seed) if source.split == "train" else 1.0
    if chance < source.hold_out:
        return "test"
    return "validation" if chance < source.hold_out + source.hold_out_validation else source.split


def subset(samples: Sequence[Sample], limit: int | None, seed: int) -> list[Sample]:
    """At most `limit` samples, drawn at random (files are often sorted), in the file's order and with whole groups."""
    if limit is None or limit >= len(samples):
        return list(samples)
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        groups[(sample.source, sample.group) if sample.group else number].append(number)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    chosen: list[int] = []
    for group in shuffled:
        if len(chosen) + len(group) <= limit or not chosen:
            chosen += group
    return [samples[i] for i in sorted(chosen[:limit])]


def by_task(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """{name of the task binding: numbers of its samples}."""
    numbers: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        numbers.setdefault(sample.task, []).append(number)
    return numbers


def sampling_weights(samples: Sequence[Sample], temperature: float) -> list[float]:
    """Times each sample is used per epoch: its weight, and with a temperature above 1 a factor by which a source of n
    rows counts n^(1 / temperature) (Arivazhagan et al. 2019, https://arxiv.org/abs/1907.05019). The sum stays.
    """
    rows: dict[int, float] = defaultdict(float)
    for sample in samples:
        rows[sample.source] += sample.weight
    wanted = {source: count ** (1 / temperature) for source, count in rows.items()}
    scale = sum(rows.values()) / sum(wanted.values())
    return [sample.weight * scale * wanted[sample.source] / rows[sample.source] for sample in samples]


def error_list(errors: Sequence[str], headline: str) -> str:
    """A headline, the first errors below it, and how many more there are."""
    more = f"\n  ... and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    return f"{headline}:\n  " + "\n  ".join(errors[:SHOWN]) + more


def content_key(messages: Sequence[Message]) -> bytes:
    """16 bytes, equal for messages with the same text and media, whatever the files are called."""
    digest = hashlib.sha256()
    for message in messages:
        for part in (message.role, *message.content):
            content = (part if isinstance(part, str) else part.key).encode()
            digest.update(len(content).to_bytes(8, "big") + content)
    return digest.digest()[:16]


def group_of(row: Row, source: Source) -> str:
    """The group that a row is held out with, '' where the source names no column for it. Raises DataError where the
    column is empty.
    """
    if source.group is None:
        return ""
    value = row.columns.get(source.group)
    if value in (None, ""):
        raise DataError(f"{row.where}: column {source.group!r}, by which rows are held out, is empty or missing")
    return str(value)


def _chance(sample: Sample, group: str, seed: int) -> float:
    """A number in [0, 1) that depends only on the seed and the row's group, or its first medium, or its question."""
    group = group or sample.group
    content = group or (sample.media[0].key if sample.media else str(sample.question))
    return int(hashlib.sha256(f"{seed}/{content}".encode()).hexdigest()[:12], 16) / 16**12


@dataclass(frozen=True)
class SplitSummary:
    """Counts of one split for the run folder; `answers`: the most frequent ones, where there are few."""

    rows: int
    media: int
    different_answers: int
    answers: dict[str, int]


def summary(splits: Splits) -> dict[str, SplitSummary]:
    summaries = {}
    for split in ("train", "validation", "test"):
        samples = splits.of(split)
        answers = Counter(sample.answer for sample in samples)
        summaries[split] = SplitSummary(
            rows=len(samples),
            media=sum(len(sample.media) for sample in samples),
            different_answers=len(answers),
            answers=dict(answers.most_common(20)) if len(answers) <= 100 else {},
        )
    return summaries
