"""Rows with answers that the recipe of a run doesn't name, to be scored as one of its tasks."""

from dataclasses import dataclass, replace
from pathlib import Path

from finetune.common.errors import DataError, RecipeError, given, option
from finetune.common.run_folder import RunFolder, read_json
from finetune.data.new_files import RowsAs, file_like
from finetune.data.rows import read_samples
from finetune.data.sample import Sample
from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.schema import Limits, Source, chosen_task, task_names


@dataclass(frozen=True)
class NewRows:
    """`task`: the name of their task binding; `source`: their file, read as source `number` of the recipe is."""

    task: str
    number: int
    source: Source

    @classmethod
    def of(cls, recipe: Recipe, path: Path, task: str | None, rows_as: RowsAs) -> "NewRows":
        """Raises RecipeError, DataError."""
        if not path.exists():
            raise RecipeError(f"{given('data', path)}: no such file or folder")
        names = task_names(recipe.data)
        number = names.index(chosen_task(names, task) or names[0])
        source = file_like(recipe.data[number], path.absolute(), rows_as)
        return cls(names[number], number, source.model_copy(update={"group": None}))

    def samples(self, limits: Limits) -> list[Sample]:
        """Raises DataError with the rows that can't be used."""
        samples = [sample for sample, _ in read_samples(self.source, limits.max_bytes)]
        return [replace(sample, task=self.task, source=self.number) for sample in samples]

    def folder(self, run: RunFolder, out: Path | str | None) -> Path:
        """Where their scores go. Raises DataError where those of other rows are, or of a run."""
        folder = run.evaluation_of(self.source.path) if out is None else Path(out)
        before = RunFolder(folder)
        if before.recipe.exists():
            raise DataError(f"{given('out', folder)}: is a run's folder; name another")
        if before.metrics.exists():
            data = read_json(before.metrics).get("data", {}).get("path")
            if data != str(self.source.path):
                raise DataError(
                    f"{folder}: holds the scores of other rows, {data}; name another folder with "
                    f"{option('--out', 'out=')}"
                )
        return folder


def refuse_unusable(run: RunFolder, data: Path, task: str | None, rows_as: RowsAs) -> None:
    """Before anything slow is imported. Raises RecipeError, DataError."""
    recipe = load_recipe(run.recipe)
    NewRows.of(recipe, data, task, rows_as).samples(recipe.media)


def refuse_without_rows(*options: object) -> None:
    """`options`: task, columns, media_folder, encoding and out. Raises RecipeError if one is given."""
    if any(options):
        names = ("task", "columns", "media_folder", "encoding", "out")
        *first, last = (option(f"--{name.replace('_', '-')}", f"{name}=") for name in names)
        raise RecipeError(
            f"{', '.join(first)} and {last} are about other rows: name them with {option('--data', 'data=')}"
        )
