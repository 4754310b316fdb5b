"""The rows that a run evaluates: fixed when it begins, whatever becomes of its files."""

from collections import defaultdict

from pydantic import BaseModel, ValidationError

from finetune.common.errors import DataError
from finetune.common.run_folder import RunFolder, damaged, read_json, write_json
from finetune.data.hold_out import sample_key
from finetune.data.rows import Splits, error_list, read_splits
from finetune.data.sample import Sample
from finetune.recipe.load import Recipe


class KeptRow(BaseModel):
    """A held-out row. `key`: of its content; `where`, `file`: as it was found when the run began."""

    key: str
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

    def kept(sample: Sample) -> KeptRow:
        file = str(recipe.data[sample.source].path)
        return KeptRow(key=key_of(sample), task=sample.task, where=sample.where, file=file)

    rows = KeptRows(validation=[*map(kept, splits.validation)], test=[*map(kept, splits.test)])
    write_json(path, rows.model_dump())


def splits_of_run(folder: RunFolder, recipe: Recipe) -> Splits:
    """The rows of a run's recipe, held out as when the run began, though its files may have more rows by now. Rows of
    runs that kept none are held out anew.

    Raises DataError where rows that were held out then are gone or were changed, ArtifactError where the file that
    names them is damaged.
    """
    splits = read_splits(recipe.data, recipe.seed, recipe.media.max_bytes)
    path = folder.data / "held_out.json"
    if not path.is_file():
        return splits
    try:
        rows = KeptRows.model_validate(read_json(path))
    except ValidationError as error:
        raise damaged(path, error, "put it back as it was, or train anew") from None
    present: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in (*splits.train, *splits.validation, *splits.test):
        present[key_of(sample), sample.task].append(sample)
    lost = [row for row in (*rows.validation, *rows.test) if (row.key, row.task) not in present]
    if lost:
        files = ", ".join(dict.fromkeys(row.file for row in lost))
        headline = (
            f"{files}: changed since {folder.path} began: {len(lost)} of {len(rows.validation) + len(rows.test)} "
            f"held-out rows, or their media, are gone or not the same. Put back the file as it was, or train anew"
        )
        raise DataError(error_list([row.where for row in lost], headline))

    def found(row: KeptRow) -> Sample:
        equal = present[row.key, row.task]
        return next((sample for sample in equal if sample.where == row.where), equal[0])

    held = {(row.key, row.task) for row in (*rows.validation, *rows.test)}
    return Splits(
        train=[sample for sample in splits.train if (key_of(sample), sample.task) not in held],
        validation=[found(row) for row in rows.validation],
        test=[found(row) for row in rows.test],
    )


def key_of(sample: Sample) -> str:
    return sample_key(sample).hex()
