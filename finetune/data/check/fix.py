"""A cleaned copy of the rows: what has errors is left out and told; nothing is changed in place."""

import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from finetune.common.errors import DataError
from finetune.data.check.ledger import ERRORS, Ledger
from finetune.data.check.lenient import DELIMITERS, lenient_rows
from finetune.data.media_store import suffix_of
from finetune.data.rows import Source, detected
from finetune.data.sample import KINDS, Row

QUARANTINED = (*ERRORS, "leak_medium", "identical")  # rows with one of these are left out
REFERENCED = ("table", "messages", "llava", "sharegpt")  # formats whose rows name files below the media folder


def fixed_sources(
    ledger: Ledger, sources: Sequence[Source], folder: Path, copy_media: bool
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Write rows-N.csv or rows-N.jsonl for each source, and quarantine.jsonl. Returns what changes in each source of
    the recipe ("path", "media_folder", "format"), relative to `folder`, and {"rows": kept, "quarantined": left out}.

    Tables stay CSV (TSV stays TSV), all else becomes JSON lines. Media stay where they are, or are copied to `media/`
    under the hash of their content: with `copy_media`, and where a format keeps them otherwise than as files named in
    rows.
    """
    changes: list[dict[str, Any]] = []
    counts = {"rows": 0, "quarantined": 0}
    number = 0
    with (folder / "quarantine.jsonl").open("w", encoding="utf-8") as quarantine:
        for index, source in enumerate(sources):
            kind, _ = source.format or detected(source.path)
            media_folder = source.media_folder or (source.path if source.path.is_dir() else source.path.parent)
            copied = Copied(source, folder / "media") if copy_media or kind not in REFERENCED else None
            suffix = (".tsv" if source.path.suffix.lower() == ".tsv" else ".csv") if kind == "table" else ".jsonl"
            name = f"rows-{index}{suffix}"

            def leave_out(row: int, columns: Any, reasons: Sequence[str], path: Path = source.path) -> None:
                entry = {"file": path.name, "row": row or None, "columns": columns, "reasons": reasons}
                quarantine.write(json_line(entry))
                counts["quarantined"] += bool(row)

            def wrong(line: int, text: str, raw: str, leave_out: Callable[..., None] = leave_out) -> None:
                leave_out(line, {"line": raw} if line else {}, [text])

            with ExitStack() as stack:
                write = _writer(stack.enter_context((folder / name).open("w", encoding="utf-8", newline="")), suffix)
                # With the file's own names of columns: the recipe goes on renaming them.
                for row in lenient_rows(replace(source, columns=None), wrong):
                    reasons = list(_reasons(ledger, number))
                    number += 1
                    if reasons:
                        leave_out(row.number, row.columns, reasons)
                    write(None if reasons else copied.of(row) if copied else row.columns, list(row.columns))
                    counts["rows"] += not reasons
            at = Path("media") if copied else media_folder
            changes.append({"path": Path(name), "media_folder": at, "format": None if kind == "table" else "messages"})
    return changes, counts


def check_target(folder: Path, sources: Sequence[Source]) -> None:
    """Raises DataError where a cleaned copy would take the place of anything but an earlier one."""
    if folder.exists() and not (folder / "quarantine.jsonl").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise DataError(f"{folder}: holds something else than a cleaned copy of rows; name a new folder with --fix")
    for source in sources:
        for path in (source.path, source.media_folder):
            if path and path.resolve().is_relative_to(folder.resolve()):
                raise DataError(f"{folder}: the rows to clean lie in it ({path}); name another folder with --fix")


@dataclass(frozen=True)
class Copied:
    """Copies media to `folder`, each content once, and writes rows that name the copies."""

    source: Source
    folder: Path

    def of(self, row: Row) -> dict[str, Any]:
        """The row's columns with media as names below `folder`."""
        renamed = {theirs: ours for ours, theirs in (self.source.columns or {}).items()}
        return {key: self._value(value, row, renamed.get(key, key)) for key, value in row.columns.items()}

    def _value(self, value: Any, row: Row, key: str) -> Any:
        if isinstance(value, list):
            return [self._value(one, row, key) for one in value]
        if isinstance(value, dict):
            if value.keys() <= {"bytes", "path"} and value:
                value = value.get("path") if value.get("bytes") is None else value["bytes"]
                return self._value(value, row, key)
            return {inner: self._value(one, row, inner) for inner, one in value.items()}
        if isinstance(value, bytes | bytearray):
            return self._kept(
                hashlib.sha256(value).hexdigest(), suffix_of(bytes(value)), lambda to: to.write_bytes(value)
            )
        single = key.removesuffix("s") if isinstance(key, str) else ""
        if isinstance(value, Path) or (isinstance(value, str) and value and single in KINDS):
            path = row.media_folder / value
            if "://" not in str(value) and not str(value).startswith("data:") and path.is_file():
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                return self._kept(digest, path.suffix, lambda to: shutil.copyfile(path, to))
        return str(value) if isinstance(value, Path) else value

    def _kept(self, digest: str, suffix: str, write: Callable[[Path], Any]) -> str:
        self.folder.mkdir(exist_ok=True)
        name = f"{digest[:32]}{suffix}"
        if not (self.folder / name).exists():
            write(self.folder / name)
        return name


def _reasons(ledger: Ledger, row: int) -> Iterator[str]:
    for code, text in ledger.all("select code, text from findings where row = ? order by id", row):
        if code in QUARANTINED:
            yield f"{code}: {text}"


def _writer(file: TextIO, suffix: str) -> Callable[[dict[str, Any] | None, list[str]], None]:
    """Takes a row, or None for one that is left out, and the names of its columns."""
    if suffix not in DELIMITERS:
        return lambda columns, _: _line(file, columns)
    writer: list[Any] = []

    def write(columns: dict[str, Any] | None, names: list[str]) -> None:
        if not writer:
            writer.append(csv.DictWriter(file, names, delimiter=DELIMITERS[suffix], lineterminator="\n"))
            writer[0].writeheader()
        if columns is not None:
            writer[0].writerow(columns)

    return write


def _line(file: TextIO, columns: dict[str, Any] | None) -> None:
    if columns is not None:
        file.write(json_line(columns))


def json_line(value: Any) -> str:
    """A line of JSON. Halves of characters, which UTF-8 can't hold, are written as JSON escapes them."""
    line = json.dumps(value, ensure_ascii=False, default=_short)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        line = json.dumps(value, default=_short)
    return line + "\n"


def _short(value: Any) -> str:
    """What JSON can't hold, such as the bytes of a medium, for someone to read."""
    return f"<{len(value):,} bytes>" if isinstance(value, bytes | bytearray) else str(value)
