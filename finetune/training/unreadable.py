"""Training rows whose media can't be read: a file lists them all; training stops, or leaves them out."""

import json
from collections.abc import Mapping, Sequence

from finetune.common.errors import DataError, option
from finetune.common.progress import console
from finetune.common.run_folder import write_text
from finetune.data.faults import SHOWN
from finetune.data.sample import Sample
from finetune.data.sample_table import SampleTable
from finetune.model.features import UnreadableMedia
from finetune.model.run import Run
from finetune.training.feature_cache import fill_cache
from finetune.training.steps import samples_of

FILE = "unreadable.jsonl"  # in RUN/data
NAMED = 3


def fill_and_choose(training: SampleTable, validation: Sequence[Sample], run: Run) -> SampleTable:
    """Encode what the feature cache lacks. Returns the training rows whose media can be read, which with
    `train.skip_bad_rows` needn't be all. Raises DataError where others can't be read, where a validation row's can't,
    and where a stage has no row left.
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
    left = training.select([number not in bad for number in range(len(training))])
    skip = run.recipe.train.skip_bad_rows and all(samples_of(stage, left) for stage in run.recipe.train.stages)
    rows = {wheres[number]: reason for number, reason in bad.items()}
    write_text(path, "".join(_line(where, reason, skip) for where, reason in rows.items()))
    unscored = {
        sample.where: reasons[name]
        for sample in validation
        for name in (f"{medium.kind} {medium.key}" for medium in sample.media)
        if name in reasons
    }
    if unscored or not skip:
        raise DataError(_message(unscored | rows, f"{len(rows):,} of {len(training):,} training rows", path))
    more = f" and {len(rows) - NAMED:,} more" if len(rows) > NAMED else ""
    console.print(
        f"left out, as their media can't be read: {len(rows):,} of {len(training):,} training rows: "
        f"{', '.join([*rows][:NAMED])}{more} (all: {path})"
    )
    return left


def _line(where: str, reason: str, left_out: bool) -> str:
    return json.dumps({"row": where, "what": reason, "left_out": left_out}, ensure_ascii=False) + "\n"


def _message(rows: Mapping[str, str], count: str, path: object) -> str:
    lines = [reason if reason.startswith(f"{where}: ") else f"{where}: {reason}" for where, reason in rows.items()]
    more = f"\n  ... and {len(lines) - SHOWN:,} more, all in {path}" if len(lines) > SHOWN else ""
    skip = option("--set train.skip_bad_rows=true", "train.skip_bad_rows: true")
    return (
        f"{count} can't be used, as their media can't be read:\n  " + "\n  ".join(lines[:SHOWN]) + more + "\n"
        f"{skip} leaves training rows out; `finetune data check RECIPE --fix DIR` writes a copy without such rows"
    )
