"""How files of rows that a recipe doesn't name are read: as its own, but in the encoding and with the delimiter that
they have.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from finetune.common.errors import DataError, RecipeError, given, option
from finetune.data.check.lenient import DELIMITERS, encoding_of
from finetune.data.formats.table import Options, refuse_workbook
from finetune.data.read import detected, read_rows
from finetune.data.sample import KINDS
from finetune.recipe.parts import FormatPart
from finetune.recipe.schema import Limits, RowFile, Source

FileT = TypeVar("FileT", bound=RowFile)
CANDIDATES = (",", ";", "\t")
TRIED = 50  # media whose files are looked for


@dataclass(frozen=True)
class RowsAs:
    """How new rows are read, where a user says so. `columns`: the task's column -> the file's, before those of the
    recipe; `media_folder`: None: the rows' own folder, one in it, or the one above, where the files are; `encoding`:
    of a table, None: the recipe's if it fits, else detected.
    """

    columns: Mapping[str, str] | None = None
    media_folder: Path | None = None
    encoding: str | None = None


def file_like(known: FileT, path: Path, rows_as: RowsAs) -> FileT:
    """`path`, read as the source `known` is, but for what `rows_as` says. Raises RecipeError, DataError."""
    part = known.format if known.format and path.suffix == known.path.suffix else detected(path)
    changes = {
        "path": path,
        "format": table_format(path, part.options, rows_as.encoding) if isinstance(part.options, Options) else part,
        "media_folder": rows_as.media_folder,
        "columns": {**known.columns, **_named(known, rows_as.columns or {})},
    }
    file = known.model_copy(update=changes)
    return file if rows_as.media_folder else file.model_copy(update={"media_folder": _media_folder(file)})


def _named(known: RowFile, columns: Mapping[str, str]) -> dict[str, str]:
    """Also by the task's own key: label=Direction where the task's `label` is the column Movement."""
    options = known.task.options.model_dump() if isinstance(known, Source) else {}
    read = {value for key, value in options.items() if key != "prompt" and value and isinstance(value, str)}
    own = {key: str(options[key]) for key in columns if options.get(key) in read and key not in read}
    return {own.get(ours, ours): theirs for ours, theirs in columns.items()}


def _media_folder(file: RowFile) -> Path | None:
    """The folder of media that rows name, None for the usual one."""
    names: list[str] = []
    with suppress(DataError):  # those who read the rows report it
        for row in islice(read_rows(file, Limits().max_bytes), TRIED):
            values = [row.columns.get(kind) for kind in KINDS]
            flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
            names += [one for one in flat if isinstance(one, str) and "://" not in one and not one.startswith("data:")]
    best = best_folder(file.folder_of_media, names)
    return None if best == file.folder_of_media else best


def best_folder(folder: Path, names: Sequence[str]) -> Path:
    """Of a folder, those in it and the one above: where most files are that are named."""
    if not names or not folder.is_dir():
        return folder
    below = [inside for inside in sorted(folder.iterdir()) if inside.is_dir()]
    return max([folder, *below, folder.parent], key=lambda place: files_in(place, names))


def files_in(folder: Path, names: Sequence[str]) -> int:
    return sum(os.path.isfile(folder / name) for name in names)


def table_format(path: Path, options: Options, encoding: str | None) -> FormatPart:
    """The format of a table with the `encoding` that is named, else with the options' own where the file has it, else
    with that which is detected; so with the delimiter. Raises RecipeError, DataError.
    """
    if path.suffix.lower() not in DELIMITERS or not path.is_file():
        return FormatPart.of("table", **options.model_dump(exclude_unset=True))
    refuse_workbook(path)
    name = option("--encoding", "encoding=")
    try:
        known = encoding or _encoding(path, options.encoding)
        with path.open(encoding=known or "utf-8-sig", errors="replace", newline="") as file:
            header = file.readline()
    except LookupError:
        raise RecipeError(
            f"{given('encoding', encoding)}: write an encoding such as gb18030, big5 or shift_jis"
        ) from None
    except DataError:
        raise DataError(f"{path}: not UTF-8, and its encoding isn't clear; name it with {name}, as gb18030") from None
    usual = options.delimiter or DELIMITERS[path.suffix.lower()]
    others = [mark for mark in CANDIDATES if mark in header]
    delimiter = others[0] if usual not in header and len(others) == 1 else options.delimiter
    found = {"encoding": known, "delimiter": delimiter}
    return FormatPart.of("table", **{key: value for key, value in found.items() if value})


def _encoding(path: Path, usual: str | None) -> str | None:
    """None for UTF-8, and for UTF-16 with its mark. Raises DataError where the encoding isn't clear."""
    if usual and _decodes(path, "ascii"):
        return usual
    if _decodes(path, "utf-8"):  # as text in another encoding hardly ever does, while UTF-8 may well decode as another
        return None
    if usual and _decodes(path, usual):
        return usual
    found = encoding_of(path)
    return None if found in ("utf-8-sig", "utf-16") else found


def _decodes(path: Path, encoding: str) -> bool:
    try:
        with path.open(encoding=encoding, newline="") as file:
            for _ in file:
                pass
    except UnicodeError:
        return False
    return True
