"""The sources of a recipe as samples, split into training, validation and test."""

import random
import shlex
from array import array
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.common.errors import DataError, MissingColumn, option
from finetune.data.check.lenient import lenient_rows
from finetune.data.faults import SHOWN, Faults
from finetune.data.hold_out import SPLITS, holds_out, keys_of, sample_key
from finetune.data.metrics import share_interval
from finetune.data.preferences import sample_of, unfit, without_reward
from finetune.data.sample import KINDS, Row, Sample
from finetune.recipe.conflicts import HOLD_OUT_KEYS
from finetune.recipe.load import Recipe
from finetune.recipe.schema import Limits, Source, Stage, task_names

if TYPE_CHECKING:
    from finetune.data.sample_table import SampleTable

FEW_ROWS = 30  # to score
SHOWN_LABELS = 5
SHOWN_ANSWERS = 100  # different ones; of more none are kept in a summary
TOGETHER = "rows that share media or a group stay together"
MOST_HELD_OUT = 0.5  # of 1: share of rows that is proposed


@dataclass(frozen=True)
class Splits:
    """`together`: of sources that hold rows out, how many rows each set has that stays together."""

    train: "SampleTable"
    validation: "SampleTable"
    test: "SampleTable"
    together: list[int] = field(default_factory=list)

    def of(self, split: str) -> "SampleTable":
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


def read_samples(source: Source, max_bytes: int) -> list[tuple[Sample, str]]:
    """All samples of one source that no recipe names, each with the group that it is held out with: '' for its own
    content. Raises DataError with the first faults, and the number of all.
    """
    faults = Faults(source, in_recipe=False)
    samples = list(_usable_rows(source, max_bytes, faults))
    if faults.count:
        raise DataError(fault_list([(faults, len(samples))]))
    return samples


def _usable_rows(source: Source, max_bytes: int, faults: Faults) -> Iterator[tuple[Sample, str]]:
    """Samples with their groups; what is wrong with the other rows goes to `faults`."""
    usable = 0
    for row in lenient_rows(source, faults.unreadable, max_bytes):
        try:
            sample, group = sample_of(row, source.task), group_of(row, source)
        except DataError as error:
            faults.unusable(row, error)
            continue
        usable += 1
        yield sample, group
    if not usable and not faults.count:
        faults.unreadable(0, f"{source.path}: no rows", "")


def fault_list(found: Sequence[tuple[Faults, int]], recipe_file: Path | None = None) -> str:
    """The faults of sources, each with the number of its usable rows, as one message."""
    lines = [line for faults, usable in found for line in faults.lines(faults.count + usable)]
    command = f"finetune data check {shlex.quote(str(recipe_file)) if recipe_file else 'RECIPE'}"
    advice = f"\n`{command}` examines all rows and media, and writes a copy without faults (--fix)"
    if not found[0][0].in_recipe:
        missing = any(f": no such {kind}: " in line for line in lines for kind in KINDS)
        folder = f"name the folder of their media with {option('--media-folder', 'media_folder=')}"
        advice = f"\nleave these rows out, or {folder}" if missing else ""
    if len(lines) == 1:
        return f"{lines[0]}{advice}"
    wrong = ", ".join(
        f"{faults.source.path}: {faults.count:,} of {faults.count + usable:,} rows can't be used"
        for faults, usable in found
    )
    return f"{error_list(lines, wrong)}{advice}"


def read_splits(
    sources: Sequence[Source], seed: int, max_bytes: int = Limits().max_bytes, recipe_file: Path | None = None
) -> Splits:
    """All samples, each under the name of its task binding. `recipe_file`: of the sources, for messages.

    `hold_out` moves exact shares of rows from training to test and validation, by seed and content; rows that share
    media or a group stay together. Raises DataError where a training row is also in another split.
    """
    from finetune.data import kept_rows  # numpy and Arrow, which a recipe is checked without
    from finetune.data.sample_table import SampleTable

    folder = kept_rows.sources_folder(sources, max_bytes)
    table = kept_rows.kept_table(folder)
    if table is None:
        table = kept_rows.keep_table(folder, sources, _columns(sources, max_bytes, recipe_file))
    samples = SampleTable(table, task_names(sources), [source.weight for source in sources])
    split, together = kept_rows.held_out(folder, samples, sources, seed)
    train, validation, test = (samples.select(split == number) for number in range(len(SPLITS)))
    splits = Splits(train, validation, test, together)
    _refuse_shared(splits)
    return splits


def _columns(sources: Sequence[Source], max_bytes: int, recipe_file: Path | None) -> Iterator[dict[str, object]]:
    """The rows of a sample table. Raises DataError, at the end, with all faults."""
    from finetune.data.sample_table import columns_of

    wrong: list[tuple[Faults, int]] = []
    files = Counter(source.path for source in sources)
    for number, source in enumerate(sources):
        faults, usable = Faults(source, f"data.{number}" if files[source.path] > 1 else ""), 0
        for sample, group in _usable_rows(source, max_bytes, faults):
            usable += 1
            if not wrong and not faults.count:
                stays = keys_of(sample, group) if holds_out(source) else ()
                yield columns_of(sample, number, stays)
        if faults.count:
            wrong.append((faults, usable))
    if wrong:
        raise DataError(fault_list(wrong, recipe_file))


def _refuse_shared(splits: Splits) -> None:
    """Raises DataError where a training row is also in another split."""
    for split in ("validation", "test"):
        keys = splits.of(split).column("key").to_pylist()
        both = splits.train.select(splits.train.with_keys(keys)) if keys else []
        training = {sample_key(sample): sample.where for sample in both}
        twice = [
            f"{training[key]} is also {where}"
            for key, where in zip(keys, splits.of(split).wheres, strict=True)
            if key in training
        ]
        if twice:
            raise DataError(
                error_list(
                    twice, f"{len(twice)} row{'s are' if len(twice) != 1 else ' is'} both in training and in {split}"
                )
            )


def refuse_empty_splits(splits: Splits, recipe: Recipe) -> None:
    """Raises DataError where there is no row to train on, in any stage, to evaluate, or to validate though the recipe
    does.
    """
    needed = ["train", recipe.evaluate.split, *(["validation"] if recipe.train.validation else [])]
    for split in dict.fromkeys(needed):
        if splits.of(split):
            continue
        if split == "train":
            if len(splits.together) == 1:
                raise DataError(
                    f"data: no row is left to train on: {TOGETHER}, here all {splits.together[0]:,} rows; set hold_out "
                    "to 0 and add a source with split: test, of other rows"
                )
            raise DataError("data: all rows are held out, none is left to train on: lower hold_out")
        raise DataError(f"data: no row is held out for {split}: {_more_held_out(splits, split, 1)}")
    left = {*splits.train.sources.tolist()}
    for number, stage in enumerate(recipe.train.stages):
        if stage.sources and left.isdisjoint(stage.sources):
            files = ", ".join(dict.fromkeys(str(recipe.data[source].path) for source in stage.sources))
            raise DataError(
                f"train.stages.{number}.sources: all rows of {files} are held out, none is left for stage "
                f"{stage.name}: lower their hold_out, or give the stage other sources"
            )


def refuse_unfit(splits: Splits, recipe: Recipe) -> None:
    """Raises DataError, with all of them, where training rows lack what a stage's objective compares, or a reward."""
    for stage in recipe.train.stages:
        if stage.objective.samples_answers:
            refuse_without_reward(splits, recipe, stage)
        if stage.objective.compares:
            used = stage.sources or [*range(len(recipe.data))]
            chosen = [number for number, source in enumerate(sources_of(splits.train)) if source in used]
            wrong = list(unfit(picked(splits.train, chosen), stage.objective.needs, recipe.data))
            if wrong:
                headline = f"stage {stage.name!r} has the objective {stage.objective.kind!r}: "
                headline += f"{len(wrong):,} of {len(chosen):,} rows can't be used"
                if not stage.sources and len(wrong) < len(chosen):
                    headline += "; its `sources` may name those with rows that can"
                counts = Counter(sources_of(splits.train))
                raise DataError(error_list(_unfit_lines(wrong, counts, recipe, stage), headline))


def _unfit_lines(
    wrong: Sequence[tuple[Sample, str]], counts: Mapping[int, int], recipe: Recipe, stage: Stage
) -> list[str]:
    """A line for each thing that is wrong with the rows of a source; a column that all of them lack, with those that
    are there. `counts`: {source: its training rows}.
    """
    column = "rejected" if stage.objective.needs == "pairs" else "desirable"
    lines = []
    for number, source in enumerate(recipe.data):
        own = {sample.where: (sample, text) for sample, text in wrong if sample.source == number}
        faults, rows = Faults(source), []
        if len(own) == counts[number] and all(getattr(sample, column) is None for sample, _ in own.values()):
            rows = [row for row in lenient_rows(source, lambda *_: None, recipe.media.max_bytes) if row.where in own]
        missing = bool(rows) and not any(column in row.columns for row in rows)
        for row in rows if missing else ():
            faults.unusable(row, MissingColumn("", column))
        for where, (_, text) in own.items() if not missing else ():
            faults.add(f"{where}: {text}", where)
        lines += faults.lines(len(own))
    return lines


def refuse_without_reward(splits: Splits, recipe: Recipe, stage: Stage) -> None:
    """Raises DataError where a task of the stage's rows measures nothing that is the reward of an answer."""
    name = getattr(stage.objective.options, "reward", "good")
    firsts = {source: number for number, source in reversed([*enumerate(sources_of(splits.train))])}
    for source, number in sorted(firsts.items()):
        if stage.sources is None or source in stage.sources:
            error = without_reward(splits.train[number], recipe.data[source].task, name)
            if error:
                raise DataError(f"data.{source}: stage {stage.name!r} learns from rewards, and {error}")


def few_rows(splits: Splits, recipe: Recipe) -> Iterator[str]:
    """Warnings of splits too small for scores to mean much."""
    there, limit = len(splits.of(recipe.evaluate.split)), recipe.evaluate.limit or FEW_ROWS
    rows = min(there, limit)
    if rows < FEW_ROWS:
        cures = [_more_held_out(splits, recipe.evaluate.split, FEW_ROWS)] if there < FEW_ROWS else []
        cures += [f"raise evaluate.limit to {FEW_ROWS} or more"] if limit < FEW_ROWS else []
        cure = "; ".join(cures)
        yield (
            f"only {rows} rows to score: a score of 50% has a 95% CI of {_range(rows)}; {cure}"
            if rows > 1
            else (f"only one row to score, which tells nothing; {cure}")
        )


def unlearned(splits: Splits, recipe: Recipe) -> Iterator[str]:
    """Warnings of labels that rows to score have and training rows lack."""
    for number, source in enumerate(recipe.data):
        if source.task.kind != "classify":
            continue
        known = {(sample.task, label) for sample in splits.train for label in _labels(sample)}
        scored = splits.of(recipe.evaluate.split)
        there = scored.select(scored.sources == number)
        missing = Counter(label for one in there for label in _labels(one) if (one.task, label) not in known)
        if missing:
            counts = ", ".join(f"{label!r} ({count})" for label, count in missing.most_common(SHOWN_LABELS))
            more = f" and {len(missing) - SHOWN_LABELS} more" if len(missing) > SHOWN_LABELS else ""
            yield (
                f"no training row has {counts}{more}, which rows to score have: they can't be learned; label more rows "
                "of them, or leave them out"
            )


def _labels(sample: Sample) -> list[str]:
    return sample.target if isinstance(sample.target, list) else [sample.answer]


def _range(rows: int) -> str:
    low, high = share_interval(rows / 2, rows)
    return f"{100 * low:.0f}–{high:.0%}"


def _more_held_out(splits: Splits, split: str, rows: int) -> str:
    """What gives at least `rows` rows of a split."""
    key = HOLD_OUT_KEYS[split]
    other = f"add a source with split: {split}" + (f" and {rows} rows or more" if rows > 1 else "")
    if not splits.together:
        return other
    total, smallest = sum(splits.together), min(splits.together)
    share = ceil(100 * max(rows, smallest) / total) / 100
    if share > MOST_HELD_OUT and smallest == 1:
        return f"label more: {rows} of {total:,} rows are too many to hold out; or {other}"
    text = f"{total:,} rows can be held out"
    if smallest > 1:
        sets = f"{len(splits.together):,} set{'s' * (len(splits.together) > 1)} of {smallest:,} or more rows"
        text = f"{TOGETHER}, here in {sets}"
    return f"{text}; {f'{key}: {share:g} would do, or ' if share <= MOST_HELD_OUT else ''}{other}"


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


def by_task(samples: Sequence[Sample]) -> dict[str, "array[int]"]:
    """{name of the task binding: numbers of its samples}."""
    table = _table(samples)
    tasks = (table.tasks[source] for source in sources_of(table)) if table else (sample.task for sample in samples)
    numbers: dict[str, array[int]] = {}
    for number, task in enumerate(tasks):
        numbers.setdefault(task, array("q")).append(number)
    return numbers


def sources_of(samples: Sequence[Sample]) -> "array[int]":
    """The number of each sample's source."""
    return array("i", table.sources.tobytes() if (table := _table(samples)) else [one.source for one in samples])


def picked(samples: Sequence[Sample], numbers: Sequence[int]) -> Sequence[Sample]:
    return table.select(numbers) if (table := _table(samples)) else [samples[number] for number in numbers]


def of_task(samples: Sequence[Sample], name: str) -> Sequence[Sample]:
    """The samples of one task binding."""
    return picked(samples, by_task(samples).get(name, []))


def answers_of(samples: Sequence[Sample]) -> Iterator[str]:
    return table.each("answer") if (table := _table(samples)) else (one.answer for one in samples)


def _table(samples: Sequence[Sample]) -> "SampleTable | None":
    """Samples in a table, of which columns are read at once; None for others."""
    from finetune.data.sample_table import SampleTable

    return samples if isinstance(samples, SampleTable) and len(samples) else None


def sampling_weights(samples: Sequence[Sample], temperature: float) -> "array[float]":
    """Times each sample is used per epoch: its weight, and with a temperature above 1 a factor by which a source of n
    rows counts n^(1 / temperature) (Arivazhagan et al. 2019, https://arxiv.org/abs/1907.05019). The sum stays.
    """
    rows: dict[int, float] = defaultdict(float)
    sources = sources_of(samples)
    table = _table(samples)
    own = (table.weights[source] for source in sources) if table else (sample.weight for sample in samples)
    weights = array("d", own)
    for source, weight in zip(sources, weights, strict=True):
        rows[source] += weight
    wanted = {source: count ** (1 / temperature) for source, count in rows.items()}
    scale = sum(rows.values()) / sum(wanted.values())
    pairs = zip(sources, weights, strict=True)
    return array("d", (weight * scale * wanted[source] / rows[source] for source, weight in pairs))


def error_list(errors: Sequence[str], headline: str) -> str:
    """A headline, the first errors below it, and how many more there are."""
    more = f"\n  ... and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    return f"{headline}:\n  " + "\n  ".join(errors[:SHOWN]) + more


def group_of(row: Row, source: Source) -> str:
    """The group that a row is held out with, '' where the source names no column for it. Raises DataError where the
    column is empty.
    """
    if source.group is None:
        return ""
    if source.group not in row.columns:
        have = ", ".join(map(repr, row.columns))[:300]
        raise MissingColumn(
            f"{row.where}: no column {source.group!r}, by which rows are held out (columns: {have})", source.group
        )
    value = row.columns[source.group]
    if value in (None, ""):
        raise DataError(f"{row.where}: column {source.group!r}, by which rows are held out, is empty")
    return str(value)


@dataclass(frozen=True)
class SplitSummary:
    """Counts of one split for the run folder; `answers`: the most frequent ones, where there are few."""

    rows: int
    media: int
    different_answers: int
    answers: dict[str, int]


def summary(splits: Splits) -> dict[str, SplitSummary]:
    summaries = {}
    for split in SPLITS:
        samples = splits.of(split)
        different, answers = samples.answers(SHOWN_ANSWERS)
        summaries[split] = SplitSummary(
            rows=len(samples),
            media=samples.count_media(),
            different_answers=different,
            answers=dict(answers.most_common(20)),
        )
    return summaries
