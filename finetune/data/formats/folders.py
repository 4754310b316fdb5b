"""A folder for each label, with its media in it: `cats/1.jpg`, `dogs/2.jpg` (ImageFolder, AudioFolder). Columns: image,
audio or video, by the file's suffix, and label.
"""

from pathlib import Path

from pydantic import Field

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.data.formats import NumberedRows, _media

ROWS_ARE_FILES = True
SHOWN = 10  # files in an error
ROWS = {  # beside folders: another format, or rows that none reads
    *(".csv", ".tsv", ".xlsx", ".xlsm", ".xls", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".tar", ".scp")
}


class Options(PartOptions):
    ignore: tuple[str, ...] = Field(
        (), description="Suffixes of other files in the folders, which are left out: ['.txt']."
    )


def detects(path: Path) -> bool:
    if not path.is_dir():
        return False
    inside = _visible(path)
    if any(file.suffix.lower() in ROWS for file in inside):
        return False
    return any(_media.kind_of(file.name) for folder in inside if folder.is_dir() for file in _visible(folder))


def rows(path: Path, options: Options) -> NumberedRows:
    if not path.is_dir():
        raise DataError(f"{path}: not a folder, which the format `folders` reads")
    ignored = {suffix.lower() for suffix in options.ignore}
    labels = [folder for folder in _visible(path) if folder.is_dir()]
    if not labels:
        raise DataError(f"{path}: no folder in it; make one for each label, and put its media into it")
    _refuse_others(path, labels, ignored)
    number = 0
    for folder in labels:
        before = number
        for file in _visible(folder):
            kind = _media.kind_of(file.name)
            if kind and file.suffix.lower() not in ignored:
                number += 1
                yield number, {kind: file.relative_to(path).as_posix(), "label": folder.name}
        if number == before:
            raise DataError(f"{folder}: no media in it, so its label has no rows; delete it or fill it")


def _refuse_others(path: Path, labels: list[Path], ignored: set[str]) -> None:
    """Raises DataError for what is neither read nor ignored: files beside the labels, folders or others in them."""
    others = [file for file in _visible(path) if not file.is_dir()]
    for folder in labels:
        others += [file for file in _visible(folder) if file.is_dir() or not _media.kind_of(file.name)]
    refused = [str(file.relative_to(path)) for file in others if file.is_dir() or file.suffix.lower() not in ignored]
    if refused:
        more = f" and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
        raise DataError(
            f"{path}: {len(refused)} files or folders that aren't media in the folder of a label: "
            f"{', '.join(refused[:SHOWN])}{more}; remove them, name the files' suffixes "
            "(`format: {kind: folders, ignore: [.txt]}`), or choose a path whose folders are the labels"
        )


def _visible(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if not _media.is_hidden(file.name))
