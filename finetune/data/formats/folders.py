"""A folder for each label, with its media in it: `cats/1.jpg`, `dogs/2.jpg` (ImageFolder, AudioFolder). Columns: image,
audio or video, by the file's suffix, and label.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.data.formats import _media

SHOWN = 10  # files listed at once
ROWS = {".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".tar", ".scp"}  # beside folders: another format


class Options(PartOptions):
    ignore: tuple[str, ...] = Field((), description="Suffixes of files that are no media and left out: ['.txt'].")


def detects(path: Path) -> bool:
    if not path.is_dir():
        return False
    inside = _visible(path)
    if any(file.suffix.lower() in ROWS for file in inside):
        return False
    return any(_media.kind_of(file.name) for folder in inside if folder.is_dir() for file in _visible(folder))


def rows(path: Path, options: Options) -> Iterator[tuple[int, dict[str, Any]]]:
    ignored = {suffix.lower() for suffix in options.ignore}
    labels = [folder for folder in _visible(path) if folder.is_dir()]
    if not labels:
        raise DataError(f"{path}: no folder in it; write one for each label, its media in it")
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
            raise DataError(f"{folder}: no media in it, so that its label has no rows; delete it or fill it")


def _refuse_others(path: Path, labels: list[Path], ignored: set[str]) -> None:
    """Raises DataError with what is neither read nor ignored: files beside the labels, folders in them, no media."""
    others = [file for file in _visible(path) if not file.is_dir()]
    for folder in labels:
        others += [file for file in _visible(folder) if file.is_dir() or not _media.kind_of(file.name)]
    wrong = [str(file.relative_to(path)) for file in others if file.is_dir() or file.suffix.lower() not in ignored]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise DataError(
            f"{path}: {len(wrong)} files or folders that are no media in the folder of a label: "
            f"{', '.join(wrong[:SHOWN])}{more}; take them away, name the files' suffixes "
            "(`format: {kind: folders, ignore: [.txt]}`), or choose a path whose folders are the labels"
        )


def _visible(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if not _media.is_hidden(file.name))
