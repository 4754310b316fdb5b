"""Rows into training, validation and test: the same way every time, with nothing in two splits."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TextIO

from finetune.common import display
from finetune.common.errors import DataError, option
from finetune.common.run_folder import file_hash, write_json
from finetune.data.check.lenient import DELIMITERS
from finetune.data.formats import _media as in_rows
from finetune.data.formats._json import SUFFIXES, array_of, is_array
from finetune.data.formats.table import SHEETS, Options
from finetune.data.hold_out import assigned, connected
from finetune.data.new_files import table_format
from finetune.data.read import detected, read_rows
from finetune.data.sample import Row
from finetune.recipe.parts import FormatPart
from finetune.recipe.schema import Limits, RowFile

MAX_BYTES = Limits().max_bytes  # of embedded media, which are refused
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SplitPlan:
    """How rows are split. `train`, `validation`, `test`: shares that sum to 1. `group`: the column whose equal values
    stay together; `stratify`: the column whose values are spread evenly.
    """

    train: float = 0.8
    validation: float = 0.1
    test: float = 0.1
    group: str | None = None
    stratify: str | None = None
    seed: int = 7

    @property
    def shares(self) -> dict[str, float]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


@dataclass(frozen=True)
class SplitResult:
    """`files`, `rows`: of each split that has rows; `media`: how many different ones; `sets`: how many sets of rows
    stay together, `largest`: rows of the largest.
    """

    files: dict[str, Path]
    rows: dict[str, int]
    media_folder: Path
    media: int
    sets: int
    largest: int

    def _repr_html_(self) -> str:
        rows = [(split, f"{self.rows[split]:,}", path) for split, path in self.files.items()]
        return display.table(("split", "rows", "file"), rows, left=True)


def data_split(
    path: Path | str,
    into: Path | str,
    plan: SplitPlan = SplitPlan(),
    *,
    media: Sequence[str] = (),
    media_folder: Path | str | None = None,
    encoding: str | None = None,
    sheet: str | None = None,
) -> SplitResult:
    """Write INTO/train, validation and test with the rows of a file or folder, in its order: CSV as CSV, JSON lines as
    they are, anything else that names its media as JSON lines; and split.json, with the counts.

    Rows with the same medium (its bytes, whatever its name), the same value of `plan.group`, or, without media, the
    same content stay together. What goes where depends on contents and `plan.seed` alone, not on the order of the rows.
    Validation and test each hold their share of all rows, and with `plan.stratify` of those with each value of that
    column, to within a row, or to within the largest set of rows that stay together (a set counts for its most frequent
    value); training has the rest.

    Media are looked up in the columns called image, audio or video, and in those that `media` names, relative to
    `media_folder` or the file's. `encoding` and `sheet` are for tables. Raises DataError.
    """
    path, into = Path(path), Path(into)
    shares = plan.shares
    if any(not 0 <= share <= 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise DataError(f"shares are {', '.join(map(str, shares.values()))}; write numbers from 0 to 1 that sum to 1")
    if not path.exists():
        raise DataError(f"no such file or folder: {path}")
    folder = Path(media_folder) if media_folder else path if path.is_dir() else path.parent
    source = RowFile(path=path, format=_format(path, encoding, sheet), media_folder=folder)
    keys, labels = _keys(source, plan, frozenset(media))
    if not keys:
        raise DataError(f"{path}: no rows")
    chosen = assigned(keys, labels, shares, plan.seed)
    into.mkdir(parents=True, exist_ok=True)
    files = _write(source, into, chosen)
    rows = {split: chosen.count(split) for split in files}
    report: dict[str, object] = {"rows": rows, "shares": shares}
    report |= {"seed": plan.seed, "group": plan.group, "stratify": plan.stratify}
    if plan.stratify is not None:
        counts = {
            split: Counter(label for s, label in zip(chosen, labels, strict=True) if s == split) for split in files
        }
        report["values"] = {split: dict(sorted(count.items())) for split, count in counts.items()}
    write_json(into / "split.json", report)
    sets = [len(rows_together) for rows_together in connected(keys)]
    return SplitResult(
        files=files,
        rows=rows,
        media_folder=folder.resolve(),
        media=len({key for row in keys for key in row if key.startswith("medium ")}),
        sets=len(sets),
        largest=max(sets),
    )


def _format(path: Path, encoding: str | None, sheet: str | None) -> FormatPart:
    part = detected(path)
    changes = {name: value for name, value in (("encoding", encoding), ("sheet", sheet)) if value is not None}
    if changes and part.kind != "table":
        name = next(iter(changes))
        raise DataError(
            f"{path}: {option('--' + name, name + '=')} is for tables; these rows are read as {part.kind!r}"
        )
    if part.kind == "table" and sheet is None and path.suffix.lower() in DELIMITERS:
        return table_format(path, Options(), encoding)
    return replace(part, options=part.options.model_copy(update=changes))


def _keys(source: RowFile, plan: SplitPlan, media_columns: frozenset[str]) -> tuple[list[list[str]], list[str]]:
    """Of each row: the keys that it shares with rows it stays together with, and its value of `plan.stratify`."""
    keys: list[list[str]] = []
    labels: list[str] = []
    digests: dict[Path, str] = {}
    for row in read_rows(source, MAX_BYTES):
        for column in (plan.group, plan.stratify):
            if column is not None and row.columns.get(column) in (None, ""):
                raise DataError(
                    f"{row.where}: column {column!r} is empty or missing (columns: {', '.join(row.columns)})"
                )
        if missing := media_columns - row.columns.keys():
            raise DataError(f"{row.where}: no column {min(missing)!r} (columns: {', '.join(row.columns)})")
        media = _media(row, media_columns)
        for path in media:
            if path not in digests:
                digests[path] = file_hash(path)
        row_keys = [f"medium {digests[path]}" for path in media]
        if not media:
            content = json.dumps(row.columns, sort_keys=True, ensure_ascii=True, default=str)
            row_keys = [f"content {sha256(content.encode()).hexdigest()}"]
        if plan.group is not None:
            row_keys.append(f"group {row.columns[plan.group]}")
        keys.append(row_keys)
        labels.append(str(row.columns[plan.stratify]) if plan.stratify is not None else "")
    return keys, labels


def _media(row: Row, media_columns: frozenset[str]) -> list[Path]:
    """The files that a row names in columns and parts of messages called after a kind of media, or in `media_columns`,
    each once. Raises DataError for missing ones, and for media embedded in the row.
    """
    paths: set[Path] = set()

    def add(value: object, key: str) -> None:
        if isinstance(value, bytes | bytearray):
            raise DataError(
                f"{row.where}: media are embedded in the row; write hold_out in the recipe, which splits such rows too"
            )
        if not in_rows.is_file_name(value, "image" if key in media_columns else key):
            return
        path = (row.media_folder / str(value)).resolve()
        if not path.is_file():
            raise DataError(
                f"{row.where}: no such {key}: {path}; name the folder of media with "
                f"{option('--media-folder', 'media_folder=')}, or leave such rows out with `finetune data check --fix`"
            )
        paths.add(path)

    for column, value in row.columns.items():
        in_rows.replaced(value, column, add)
    return sorted(paths)


def _write(source: RowFile, into: Path, chosen: Sequence[str]) -> dict[str, Path]:
    """Write each row to its split's file; splits without rows have none."""
    suffix = source.path.suffix.lower() if source.path.is_file() else ""
    table = suffix in (*DELIMITERS, *SHEETS)
    suffix = ".csv" if suffix in SHEETS else suffix if suffix in (*DELIMITERS, ".json", ".ndjson") else ".jsonl"
    if suffix == ".json" and not is_array(source.path):
        suffix = ".jsonl"
    paths = {split: into / f"{split}{suffix}" for split in SPLITS if split in chosen}
    for path in paths.values():
        if path.resolve() == source.path.resolve():
            raise DataError(
                f"{path}: would be written over the rows that are split; name another folder with "
                f"{option('--into', 'into=')}"
            )
    for split in SPLITS:  # of an earlier call with other shares
        (into / f"{split}{suffix}").unlink(missing_ok=True)
    with ExitStack() as stack:
        files = {s: stack.enter_context(path.open("w", encoding="utf-8", newline="")) for s, path in paths.items()}
        if table:
            _write_table(source, files, chosen, DELIMITERS[suffix])
        else:
            _write_json(source, files, chosen, array=suffix == ".json")
    return paths


def _write_table(source: RowFile, files: Mapping[str, TextIO], chosen: Sequence[str], delimiter: str) -> None:
    writers: dict[str, csv.DictWriter[str]] = {}
    for split, row in zip(chosen, read_rows(source, MAX_BYTES), strict=True):
        if split not in writers:
            writers[split] = csv.DictWriter(files[split], row.columns, delimiter=delimiter)
            writers[split].writeheader()
        writers[split].writerow(row.columns)


def _write_json(source: RowFile, files: Mapping[str, TextIO], chosen: Sequence[str], array: bool) -> None:
    """JSON lines, or one `array` with an element per line."""
    separators = dict.fromkeys(files, "[\n" if array else "")
    for split, line in zip(chosen, _json_rows(source), strict=True):
        files[split].write(separators[split] + line)
        separators[split] = ",\n" if array else "\n"
    for file in files.values():
        file.write("\n]\n" if array else "\n")


def _json_rows(source: RowFile) -> Iterator[str]:
    """Rows of JSON as the file has them, a line each; of other formats as JSON, media relative to the folder."""
    path = source.path
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        for row in read_rows(source, MAX_BYTES):
            relative = partial(_relative, row.media_folder)
            columns = {name: in_rows.replaced(value, name, relative) for name, value in row.columns.items()}
            yield json.dumps(columns, ensure_ascii=False)
        return
    if is_array(path):
        yield from (json.dumps(value, ensure_ascii=False) for _, value in array_of(path))
        return
    with path.open(encoding="utf-8-sig") as lines:
        yield from (line.strip() for line in lines if line.strip())


def _relative(folder: Path, value: object, key: str) -> object:
    if not isinstance(value, Path):
        return value
    path = (folder / value).resolve()
    return str(path.relative_to(folder.resolve())) if path.is_relative_to(folder.resolve()) else str(path)
