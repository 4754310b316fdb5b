"""A cleaned copy of the rows: those with errors go to quarantine.jsonl; nothing is changed in place."""

import csv
import json
import shutil
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TextIO

from finetune.common.errors import DataError, option
from finetune.common.run_folder import file_hash
from finetune.data.check.ledger import ERRORS, Ledger
from finetune.data.check.lenient import DELIMITERS, lenient_rows
from finetune.data.formats import Columns
from finetune.data.formats._media import is_file_name, replaced
from finetune.data.media_store import stored
from finetune.data.read import detected
from finetune.data.sample import Row
from finetune.recipe.parts import FormatPart
from finetune.recipe.schema import RowFile, Source
from finetune.recipe.yaml_reader import read_text, read_yaml

QUARANTINED = (*ERRORS, "leak_medium", "identical")  # rows with one of these findings are left out
REFERENCING = ("table", "messages", "llava", "sharegpt")  # formats whose rows name files below the media folder


def clean_copy(
    ledger: Ledger, sources: Sequence[Source], folder: Path, copy_media: bool
) -> tuple[list[Source], int, int, bool]:
    """Write rows-N.csv or rows-N.jsonl for each source, and quarantine.jsonl. Returns the sources of the copy, with
    paths relative to `folder`, how many rows were written, how many left out, and whether each source has some left.

    Tables stay CSV (TSV stays TSV), all else becomes JSON lines. Media stay where they are, or are copied to `media/`
    each content once: with `copy_media`, and from formats that keep them otherwise than as files named in rows.
    """
    with (folder / "quarantine.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as file:
        cleaner = _Cleaner(ledger, folder, copy_media, file)
        cleaned = [cleaner.clean(source, f"rows-{index}") for index, source in enumerate(sources)]
    return cleaned, cleaner.written, cleaner.quarantined, not cleaner.emptied


class _Cleaner:
    """Writes rows to the copy or to the quarantine; rows are numbered over all sources, as in the ledger."""

    def __init__(self, ledger: Ledger, folder: Path, copy_media: bool, quarantine: TextIO) -> None:
        self.ledger = ledger
        self.folder = folder
        self.copy_media = copy_media
        self.quarantine = quarantine
        self.numbers = count()
        self.written = self.quarantined = self.emptied = 0
        self.names: dict[str, str] = {}  # hash of a copied medium -> its name

    def clean(self, source: Source, stem: str) -> Source:
        kind = (source.format or detected(source.path)).kind
        table = kind == "table"
        suffix = (".tsv" if source.path.suffix.lower() == ".tsv" else ".csv") if table else ".jsonl"
        copies = self.copy_media or kind not in REFERENCING

        def unreadable(line: int, text: str, raw: str) -> None:
            self.leave_out(source, line, {"line": raw} if line else {}, [text])

        path, before = self.folder / (stem + suffix), self.written
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer: csv.DictWriter[str] | None = None
            # Under the file's own names of columns: the recipe goes on renaming them.
            for row, number in zip(
                lenient_rows(source.model_copy(update={"columns": {}}), unreadable), self.numbers, strict=False
            ):
                if table and writer is None:
                    writer = csv.DictWriter(file, row.columns, delimiter=DELIMITERS[suffix], lineterminator="\n")
                    writer.writeheader()
                if reasons := self.reasons(number):
                    self.leave_out(source, row.number, row.columns, reasons)
                    continue
                columns = copied(row, source, self.folder / "media", self.names) if copies else row.columns
                if writer:
                    writer.writerow(columns)
                else:
                    file.write(json_line(columns))
                self.written += 1
        self.emptied += self.written == before
        place = {
            "path": Path(path.name),
            "media_folder": Path("media") if copies else source.folder_of_media,
            "format": None if table else FormatPart.of("messages"),
        }
        return source.model_copy(update=place)

    def reasons(self, row: int) -> list[str]:
        findings = self.ledger.query("select code, text from findings where row = ? order by id", row)
        return [f"{code}: {text}" for code, text in findings if code in QUARANTINED]

    def leave_out(self, source: RowFile, line: int, columns: Columns, reasons: list[str]) -> None:
        entry = {"file": source.path.name, "row": line or None, "columns": columns, "reasons": reasons}
        self.quarantine.write(json_line(entry))
        self.quarantined += bool(line)


def check_target(folder: Path, name: str, sources: Sequence[RowFile]) -> None:
    """Raises DataError if a cleaned copy for the recipe `name` would replace anything but an earlier one for it."""
    if folder.exists() and not (folder / "quarantine.jsonl").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise DataError(
            f"{folder}: holds something else than a cleaned copy of rows; name a new folder with "
            f"{option('--fix', 'fix=')}"
        )
    recipe = folder / "recipe.yaml"
    if recipe.is_file() and read_yaml(read_text(recipe), str(recipe)).value["name"] != name:
        raise DataError(
            f"{folder}: holds a cleaned copy for another recipe, which may still need it; name another folder with "
            f"{option('--fix', 'fix=')}"
        )
    for source in sources:
        for path in (source.path, source.media_folder):
            if path and path.resolve().is_relative_to(folder.resolve()):
                raise DataError(
                    f"{folder}: the rows to clean lie in it ({path}); name another folder with "
                    f"{option('--fix', 'fix=')}"
                )


def copied(row: Row, source: RowFile, folder: Path, names: dict[str, str]) -> Columns:
    """The row's columns, its media as names below `folder`, to which each content is copied once. `names`: {hash: name}
    of those that are there.
    """
    renamed = {theirs: ours for ours, theirs in source.columns.items()}

    def copy(value: object, key: str) -> object:
        path = Path()
        if isinstance(value, bytes | bytearray) and value:
            path = stored(bytes(value), row.where, row.max_bytes)
        elif is_file_name(value, key):
            path = row.media_folder / str(value)
        if not path.is_file():
            return str(value) if isinstance(value, Path) else value
        folder.mkdir(exist_ok=True)
        digest = file_hash(path)
        if digest not in names:
            names[digest] = f"{path.stem}-{digest[:8]}{path.suffix}"
            shutil.copyfile(path, folder / names[digest])
        return names[digest]

    return {key: replaced(value, renamed.get(key, key), copy) for key, value in row.columns.items()}


def json_line(value: object) -> str:
    """A line of JSON, for a file that escapes what UTF-8 can't encode: lone surrogates."""
    return json.dumps(value, ensure_ascii=False, default=_readable) + "\n"


def _readable(value: object) -> str:
    """What JSON has no type for, such as the bytes of a medium, for people to read."""
    return f"<{len(value):,} bytes>" if isinstance(value, bytes | bytearray) else str(value)
