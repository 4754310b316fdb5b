"""The rows of a file, in its format."""

import os
from collections.abc import Iterator
from pathlib import Path

from finetune.common.errors import DataError
from finetune.common.registry import load_part, part_names
from finetune.data.formats import Columns
from finetune.data.sample import KINDS, Row
from finetune.recipe.parts import FormatPart
from finetune.recipe.schema import RowFile

SPREADSHEETS = {".xls", ".xlsb", ".ods", ".et", ".numbers"}  # of Excel, LibreOffice, WPS, Numbers


def read_rows(file: RowFile, max_bytes: int) -> Iterator[Row]:
    """The rows of one file or source, one at a time, columns renamed as the recipe says; `max_bytes` limits embedded
    and downloaded media. Raises DataError.
    """
    part = file.format or detected(file.path)
    folder, hosts = file.folder_of_media, tuple(file.hosts)
    root, of_files = os.path.realpath(folder), _rows_are_files(part)
    for number, columns in part.module.rows(file.path, part.options):
        own = _file_of(columns) if of_files else ""
        columns = columns | {ours: columns[theirs] for ours, theirs in file.columns.items() if theirs in columns}
        yield Row(
            file.path, number, columns, folder, file.outside_media_folder, hosts, max_bytes, file.columns, root, own
        )


def file_names(file: RowFile) -> list[str]:
    """Of a folder whose rows are files: `Row.where` of each, in their order; else []. Raises DataError."""
    part = file.format or detected(file.path)
    if not _rows_are_files(part):
        return []
    return [f"{file.path.name}/{_file_of(columns)}" for _, columns in part.module.rows(file.path, part.options)]


def _rows_are_files(part: FormatPart) -> bool:
    return getattr(part.module, "ROWS_ARE_FILES", False)


def _file_of(columns: Columns) -> str:
    return next(str(columns[kind]) for kind in KINDS if kind in columns)


def detected(path: Path) -> FormatPart:
    """The format of a file or folder. Raises DataError where none, or more than one, recognises it."""
    matching = formats_of(path)
    if not matching:
        known = ", ".join(part_names(FormatPart.folder))
        cure = other_spreadsheet(path) or f"name one with `data.N.format` ({known})"
        raise DataError(f"{path}: no format recognises it; {cure}")
    if len(matching) > 1:
        raise DataError(f"{path}: could be {' or '.join(matching)}; name one with `data.N.format`")
    return FormatPart.of(matching[0])


def other_spreadsheet(path: Path) -> str:
    """What to do about a spreadsheet that isn't read, '' for other files."""
    return "save it as .xlsx, or as CSV in UTF-8" if path.suffix.lower() in SPREADSHEETS else ""


def formats_of(path: Path) -> list[str]:
    """The names of those that recognise a file or folder."""
    return [kind for kind in part_names(FormatPart.folder) if load_part(FormatPart.folder, kind).detects(path)]
