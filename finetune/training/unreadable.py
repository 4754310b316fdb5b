"""Training rows whose media can't be read: a file lists them all; training stops, or leaves them out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.common.errors import DataError, option
from finetune.common.progress import console
from finetune.common.run_folder import write_text
from finetune.data.faults import SHOWN
from finetune.data.sample import Sample
from finetune.data.sample_table import SampleTable
from finetune.model.features import UnreadableMedia
from finetune.model.run import Run
from finetune.recipe.load import Recipe
from finetune.training.feature_cache import fill_cache
from finetune.training.steps import samples_of

FILE = "unreadable.jsonl"  # in RUN/data
NAMED = 3


@dataclass(frozen=True)
class UnreadableRow:
    where: str
    reason: str


def fill_and_leave_out(training: SampleTable, validation: Sequence[Sample], run: Run) -> SampleTable:
    """Encode what the feature cache lacks. Returns the training rows whose media can be read, which with
    `train.skip_bad_rows` needn't be all. Raises DataError where others can't be read, where a validation row's can't,
    where a teacher has read all rows, and where a stage has no row left.
    """
    held_out = [medium for sample in validation for medium in sample.media]
    run.features.check([*training.media_keys(), *((medium.kind, medium.key) for medium in held_out)])
    media = [*training.different_media(run.features.known), *held_out]
    path = run.folder.data / FILE
    try:
        fill_cache(media, run.features, run.recipe.train)
        path.unlink(missing_ok=True)  # of an earlier start
        return training
    except UnreadableMedia as error:
        reasons = {f"{kind} {key}": reason for (kind, key), reason in error.reasons.items()}
    bad = {
        number: next(reasons[name] for name in names if name in reasons)
        for number, names in enumerate(training.column("media").to_pylist())
        if not reasons.keys().isdisjoint(names)
    }
    wheres = list(training.wheres)
    rows = [UnreadableRow(wheres[number], reason) for number, reason in bad.items()]
    scored = [
        UnreadableRow(sample.where, reasons[name])
        for sample in validation
        for name in (f"{medium.kind} {medium.key}" for medium in sample.media)
        if name in reasons
    ]
    left = training.select([number not in bad for number in range(len(training))])
    why = _why_not_left_out(run.recipe, scored, left)
    all_rows = [*scored, *rows]
    write_text(path, "".join(_line(row, left_out=not why) for row in all_rows))
    count = f"{len(rows):,} of {len(training):,} training rows"
    if why:
        count += f" and {len(scored):,} rows to score" if scored else ""
        raise DataError(_message(all_rows, count, why, path))
    more = f" and {len(rows) - NAMED:,} more" if len(rows) > NAMED else ""
    names = ", ".join(row.where for row in rows[:NAMED])
    console.print(f"left out, as their media can't be read: {count}: {names}{more} (all: {path})")
    return left


def _why_not_left_out(recipe: Recipe, scored: Sequence[UnreadableRow], left: SampleTable) -> str:
    """Why training stops at rows that can't be read, as a part of its message; '' where it leaves them out."""
    if scored:
        return "rows to score are never left out"
    if any(stage.objective.needs == "teacher" for stage in recipe.train.stages):
        return "none is left out, as the teacher has read them all"
    if empty := [stage.name for stage in recipe.train.stages if not samples_of(stage, left)]:
        return f"without them stage {empty[0]!r} has no row"
    if not recipe.train.skip_bad_rows:
        return f"{option('--set train.skip_bad_rows=true', 'train.skip_bad_rows: true')} leaves training rows out"
    return ""


def _line(row: UnreadableRow, left_out: bool) -> str:
    return json.dumps({"row": row.where, "what": row.reason, "left_out": left_out}, ensure_ascii=False) + "\n"


def _message(rows: Sequence[UnreadableRow], count: str, why: str, path: Path) -> str:
    lines = [f"{row.where}: {row.reason}" for row in rows[:SHOWN]]
    more = f"\n  ... and {len(rows) - SHOWN:,} more, all in {path}" if len(rows) > SHOWN else ""
    return (
        f"{count} can't be used, as their media can't be read:\n  " + "\n  ".join(lines) + more + f"\n{why}; "
        "`finetune data check RECIPE --fix DIR` writes a copy without such rows"
    )
