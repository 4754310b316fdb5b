"""The rows that a run evaluates: fixed when it begins, whatever becomes of its files."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from finetune.common.errors import DataError
from finetune.common.run_folder import RunFolder, damaged, read_json, write_json
from finetune.data.rows import Splits, error_list, read_splits
from finetune.data.sample_table import SampleTable
from finetune.recipe.load import Recipe


class KeptRow(BaseModel):
    """A held-out row. `key`: of its content; `where`, `file`: as it was found when the run began."""

    key: str = Field(pattern="^[0-9a-f]{32}$")
    task: str
    where: str
    file: str


class KeptRows(BaseModel):
    validation: list[KeptRow]
    test: list[KeptRow]


def keep_rows(folder: RunFolder, splits: Splits, recipe: Recipe) -> None:
    """Write which rows a run evaluates, when it begins; a resumed run keeps those that it began with."""
    path = folder.data / "held_out.json"
    if path.is_file():
        return

    def kept(samples: SampleTable) -> list[dict[str, str]]:  # objects of many rows would take much more room
        columns = samples.each("key"), samples.sources.tolist(), samples.wheres
        return [
            {"key": key.hex(), "task": samples.tasks[source], "where": where, "file": files[source]}
            for key, source, where in zip(*columns, strict=True)
        ]

    files = [str(source.path) for source in recipe.data]
    write_json(path, {"validation": kept(splits.validation), "test": kept(splits.test)})


def splits_of_run(folder: RunFolder, recipe: Recipe) -> Splits:
    """The rows of a run's recipe, held out as when the run began, though its files may have more rows by now. Rows of
    runs that kept none are held out anew.

    Raises DataError where rows that were held out then are gone or were changed, ArtifactError where the file that
    names them is damaged.
    """
    splits = read_splits(recipe.data, recipe.seed, recipe.media.max_bytes, recipe.file)
    path = folder.data / "held_out.json"
    if not path.is_file():
        return splits
    try:
        rows = KeptRows.model_validate(read_json(path))
    except ValidationError as error:
        raise damaged(path, error, "put it back as it was, or train anew") from None
    present = _places(splits, [bytes.fromhex(row.key) for row in (*rows.validation, *rows.test)])
    lost = [row for row in (*rows.validation, *rows.test) if (row.key, row.task) not in present]
    if lost:
        files = ", ".join(dict.fromkeys(row.file for row in lost))
        headline = (
            f"{files}: changed since {folder.path} began: {len(lost)} of {len(rows.validation) + len(rows.test)} "
            f"held-out rows, or their media, are gone or not the same. Put back the file as it was, or train anew"
        )
        raise DataError(error_list([row.where for row in lost], headline))

    def found(kept: Sequence[KeptRow]) -> SampleTable:
        equal = (present[row.key, row.task] for row in kept)
        numbers = [own.get(row.where, next(iter(own.values()))) for row, own in zip(kept, equal, strict=True)]
        return splits.train.at(np.array(numbers, np.int64))

    held = {(row.key, row.task) for row in (*rows.validation, *rows.test)}
    numbers = [number for place, own in present.items() if place in held for number in own.values()]
    train = splits.train.numbers
    return Splits(splits.train.at(train[~np.isin(train, numbers)]), found(rows.validation), found(rows.test))


def _places(splits: Splits, keys: Sequence[bytes]) -> dict[tuple[str, str], dict[str, int]]:
    """{(key of a sample, its task): {its row: its number in the table}}, of all splits."""
    places: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for samples in (splits.train, splits.validation, splits.test):
        own = samples.select(samples.with_keys(keys))
        columns = own.column("key").to_pylist(), own.sources.tolist(), own.wheres, own.numbers.tolist()
        for key, source, where, number in zip(*columns, strict=True):
            places[key.hex(), own.tasks[source]].setdefault(where, number)
    return places
