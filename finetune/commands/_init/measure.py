"""The rows as samples of the task: how many are usable, their media, their tokens, and the schedule for them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from finetune.commands._init.columns import HAN
from finetune.commands._init.files import Found
from finetune.common.errors import DataError
from finetune.data.check.lenient import lenient_rows
from finetune.data.faults import Faults
from finetune.data.formats import Columns
from finetune.data.hold_out import connected, keys_of, splits_of
from finetune.data.media import decode
from finetune.data.media.audio import RATE
from finetune.data.media.image import image_size
from finetune.data.preferences import sample_of
from finetune.data.rows import error_list, group_of
from finetune.data.sample import Medium, Sample, by_kind, texts_in
from finetune.recipe.schema import Limits, Source

MEASURED = 24  # media of a kind that are opened
TURN = 12  # tokens of a chat template around a turn
SECONDS = 10.0  # taken for a recording's length where none can be read
STEPS_AN_EPOCH = 25  # at least, if the rows allow it
ALIGN_STEPS, TUNE_STEPS = 60, 90  # at least; below about 100 optimizer steps little is learned
MARGIN = 1.25  # by which the longest row may be longer than estimated
SMALLEST = 256  # tokens of a packed row


@dataclass(frozen=True)
class Rows:
    """Usable rows of a source, each with the group that it is held out with. `wrong`: errors of the others."""

    samples: tuple[Sample, ...]
    groups: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class MediaSizes:
    """Of one kind: `text` to read, such as '64x48 to 640x480 pixels'; `seconds`: mean and longest of those measured."""

    kind: str
    number: int
    text: str
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Lengths:
    """Tokens of a row, of the longest row, and of the longest answer."""

    mean: float
    longest: float
    answer: float


@dataclass(frozen=True)
class Schedule:
    """`steps`: optimizer steps of all epochs, about. `longest`: estimated tokens of the longest row."""

    tokens_per_batch: int
    align: int
    tune: int
    steps: int
    longest: int
    answer_tokens: int


def examined(file: Found, count: int) -> list[Columns]:
    """The first rows that can be read. Raises DataError if there are none."""
    wrong: list[str] = []
    rows = lenient_rows(file.as_row_file(), lambda line, text, raw: wrong.append(text), Limits().max_bytes)
    columns = [row.columns for row in islice(rows, count)]
    if not columns:
        raise DataError(wrong[0] if wrong else f"{file.path}: no rows")
    return columns


def usable_rows(source: Source) -> Rows:
    """Raises DataError if no row is usable."""
    usable: list[tuple[Sample, str]] = []
    wrong: list[str] = []
    faults = Faults(source, in_recipe=False)

    def unreadable(line: int, text: str, raw: str) -> None:
        wrong.append(text)
        faults.unreadable(line, text, raw)

    for row in lenient_rows(source, unreadable, Limits().max_bytes):
        try:
            usable.append((sample_of(row, source.task), group_of(row, source)))
        except DataError as error:
            wrong.append(str(error))
            faults.unusable(row, error)
    if not usable:
        lines = faults.lines(len(wrong))
        raise DataError(error_list(lines, f"{source.path}: no row can be used") if wrong else f"{source.path}: no rows")
    samples, groups = zip(*usable, strict=True)
    return Rows(samples, groups, tuple(wrong))


def held_out(rows: Rows, source: Source, seed: int) -> int:
    """How many become test rows."""
    keys = [keys_of(sample, group) for sample, group in zip(rows.samples, rows.groups, strict=True)]
    return splits_of(keys, [0] * len(keys), [source], seed).count("test") if source.split == "train" else 0


def sets(rows: Rows) -> int:
    """How many sets there are of rows that stay together."""
    return len(connected([keys_of(sample, group) for sample, group in zip(rows.samples, rows.groups, strict=True)]))


def media_sizes(samples: Sequence[Sample]) -> list[MediaSizes]:
    """By some media of each kind, spread over the rows. Those that can't be decoded are left to `data check`."""
    sizes = []
    for kind, media in by_kind(medium for sample in samples for medium in sample.media).items():
        measured = []
        for medium in media[:: max(len(media) // MEASURED, 1)][:MEASURED]:
            try:
                measured.append(_size(medium))
            except DataError:
                continue
        unit = "pixels" if kind == "image" else "s"
        low, high = min(measured, default=None, key=math.prod), max(measured, default=None, key=math.prod)
        ends = [f"{'x'.join(f'{x:.4g}' for x in size)}" for size in (low, high) if size]
        text = f"{' to '.join(dict.fromkeys(ends))} {unit}" if ends else "none could be opened"
        seconds = [size[0] for size in measured] if kind != "image" and measured else [SECONDS]
        sizes.append(MediaSizes(kind, len(set(media)), text, (sum(seconds) / len(seconds), max(seconds))))
    return sizes


def lengths(samples: Sequence[Sample], tokens: Mapping[str, float], sizes: Sequence[MediaSizes]) -> Lengths:
    """Estimated tokens. `tokens`: of one medium of a kind, or of a second of sound."""
    seconds = {size.kind: size.seconds if size.kind == "audio" else (1.0, 1.0) for size in sizes}
    mean = longest = answer = 0.0
    for sample in samples:
        text = TURN * len(sample.messages) + sum(map(_tokens, texts_in(sample.messages)))
        kinds = [medium.kind for medium in sample.media]
        mean += (text + sum(tokens[kind] * seconds[kind][0] for kind in kinds)) / len(samples)
        longest = max(longest, text + sum(tokens[kind] * seconds[kind][1] for kind in kinds))
        answer = max(answer, _tokens(sample.answer))
    return Lengths(mean, longest, answer)


def schedule(length: Lengths, rows: int, most: int, aligns: bool) -> Schedule:
    """For so many training rows. `most`: tokens per packed row that the card allows; `aligns`: whether there is a first
    stage, for projectors and heads. Packed rows are so short that an epoch has some steps, yet hold the longest row.
    """
    tokens, size = length.mean * rows, most
    while size > SMALLEST and tokens / size < STEPS_AN_EPOCH:
        size //= 2
    while size < length.longest * MARGIN:
        size *= 2
    per_epoch = max(math.floor(tokens / size), 1)
    align = math.ceil(ALIGN_STEPS / per_epoch) if aligns else 0
    tune = max(math.ceil((TUNE_STEPS + (0 if aligns else ALIGN_STEPS)) / per_epoch), 2)
    answer = min(max(8 * math.ceil(length.answer * MARGIN / 8), 8), 512)
    return Schedule(size, align, tune, (align + tune) * per_epoch, round(length.longest), answer)


def _tokens(text: str) -> float:
    """A guess between the vocabularies of small and large LLMs: 1 per Chinese character, 1 per 3.5 others."""
    chinese = len(HAN.findall(text))
    return chinese + (len(text) - chinese) / 3.5


def _size(medium: Medium) -> tuple[float, ...]:
    """(width, height) in pixels, or (seconds,). Raises DataError."""
    if medium.kind == "image":
        width, height = image_size(medium.path, where=medium.where)
        return float(width), float(height)
    if medium.kind == "audio":
        return (len(decode("audio", medium.path, where=medium.where)) / RATE,)
    # The middle frame of a clip stands for half of its length.
    return (2 * decode("video", medium.path, where=medium.where, count=1).seconds[0],)
