"""Rows into training, validation and test, the same way every time, and nothing of one split in another."""

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

from finetune.common.errors import DataError
from finetune.common.run_folder import write_json
from finetune.data.check.inspect import digest_of
from finetune.data.check.lenient import DELIMITERS
from finetune.data.formats._json import array_of, is_array
from finetune.data.rows import Source, detected, read_rows
from finetune.data.sample import KINDS, Row

SPLITS = ("train", "validation", "test")
SHEETS = (".xlsx", ".xlsm")


def data_split(
    path: Path | str,
    into: Path | str,
    *,
    train: float = 0.8,
    validation: float = 0.1,
    test: float = 0.1,
    group: str | None = None,
    stratify: str | None = None,
    seed: int = 7,
    media: Sequence[str] = (),
    media_folder: Path | str | None = None,
    encoding: str | None = None,
    sheet: str | None = None,
) -> dict[str, Any]:
    """Write INTO/train, validation and test with the rows of a file or folder, in its order: CSV as CSV, JSON lines as
    they are, anything else that names its media as JSON lines; and split.json, with the counts.

    Rows with the same medium (its bytes, whatever its name), the same value of column `group`, or, without media, the
    same content stay together. What goes where depends on contents and `seed` alone, not on the order of the rows.
    Validation and test each hold their share of all rows, and with `stratify` of those with each value of that column,
    to within a row, or to within the largest set of rows that stay together (a set counts for its most frequent value);
    training has the rest.

    Media are looked for in columns called image, audio or video, and in those that `media` names, relative to
    `media_folder` or the file's. `encoding` and `sheet` are of tables.

    Returns {"files": {split: path}, "rows": {split: n}, "media_folder": Path, "media": files found, "sets": how many
    sets of rows stay together, "largest": rows of the largest of them}. Raises DataError.
    """
    path, into = Path(path), Path(into)
    shares = {"train": train, "validation": validation, "test": test}
    if any(not 0 <= share <= 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise DataError(f"shares are {', '.join(map(str, shares.values()))}; write numbers from 0 to 1 that sum to 1")
    if not path.exists():
        raise DataError(f"no such file or folder: {path}")
    folder = Path(media_folder) if media_folder else path if path.is_dir() else path.parent
    source = Source(path=path, task=("", None), format=_format(path, encoding, sheet), media_folder=folder)
    keys, labels = _keys(source, group, stratify, frozenset(media))
    if not keys:
        raise DataError(f"{path}: no rows")
    chosen = assigned(keys, labels, shares, seed)
    into.mkdir(parents=True, exist_ok=True)
    files = _write(source, into, chosen)
    rows = {split: chosen.count(split) for split in files}
    sets = [len(one) for one in _connected(keys)]
    found = {key for row in keys for key in row if key.startswith("medium ")}
    told: dict[str, Any] = {"rows": rows, "shares": shares, "seed": seed, "group": group, "stratify": stratify}
    if stratify is not None:
        told["values"] = {split: dict(sorted(_counts(chosen, labels, split).items())) for split in files}
    write_json(into / "split.json", told)
    counts = {"media": len(found), "sets": len(sets), "largest": max(sets)}
    return {"files": files, "rows": rows, "media_folder": folder.resolve(), **counts}


def _format(path: Path, encoding: str | None, sheet: str | None) -> tuple[str, Any]:
    kind, options = detected(path)
    given = {name: value for name, value in (("encoding", encoding), ("sheet", sheet)) if value is not None}
    if given and kind != "table":
        raise DataError(f"{path}: --{next(iter(given))} is for tables; these rows are read as {kind!r}")
    return kind, options.model_copy(update=given)


def assigned(keys: Sequence[Sequence[str]], labels: Sequence[str], shares: Mapping[str, float], seed: int) -> list[str]:
    """The split of each row. `keys`: rows that share one stay together; `labels`: what is spread evenly."""
    sets = _connected(keys)
    strata: dict[str, list[list[int]]] = defaultdict(list)
    for rows in sets:
        counts = Counter(labels[row] for row in rows)
        strata[min(counts, key=lambda label: (-counts[label], label))].append(rows)
    result = [""] * len(keys)
    owed = dict.fromkeys(shares, 0.0)  # rows by which earlier values fell short: small ones would else all round down
    rest, *filling = [split for split in SPLITS if shares[split]]
    for label in sorted(strata):
        within = sorted(strata[label], key=lambda rows: _chance(min(key for row in rows for key in keys[row]), seed))
        total = sum(map(len, within))
        wanted = {split: shares[split] * total + owed[split] for split in shares}
        taken = dict.fromkeys(shares, 0)
        for rows in within:
            # As long as it comes nearer to what is wanted.
            split = next((s for s in filling if taken[s] + len(rows) / 2 <= wanted[s]), rest)
            taken[split] += len(rows)
            for row in rows:
                result[row] = split
        owed = {split: wanted[split] - taken[split] for split in shares}
    return result


def _keys(
    source: Source, group: str | None, stratify: str | None, called: frozenset[str]
) -> tuple[list[list[str]], list[str]]:
    """Of each row: what keeps it together with others, and its value of `stratify`."""
    keys: list[list[str]] = []
    labels: list[str] = []
    digests: dict[Path, str] = {}
    for row in read_rows(source):
        for column in (group, stratify):
            if column is not None and row.columns.get(column) in (None, ""):
                raise DataError(
                    f"{row.where}: column {column!r} is empty or missing (columns: {', '.join(row.columns)})"
                )
        if missing := called - row.columns.keys():
            raise DataError(f"{row.where}: no column {min(missing)!r} (columns: {', '.join(row.columns)})")
        media = sorted(set(_media(row, row.columns, "", called)))
        for path in media:
            if path not in digests:
                digests[path] = digest_of(path).hex()
        found = [f"medium {digests[path]}" for path in media]
        if not media:
            content = json.dumps(row.columns, sort_keys=True, ensure_ascii=True, default=str)
            found = [f"content {sha256(content.encode()).hexdigest()}"]
        keys.append(found + ([f"group {row.columns[group]}"] if group is not None else []))
        labels.append(str(row.columns[stratify]) if stratify is not None else "")
    return keys, labels


def _media(row: Row, value: Any, key: str, called: frozenset[str]) -> Iterator[Path]:
    """Files that a row names: values of columns, and of parts of messages, that are called after a kind of medium, or
    as `called` says.
    """
    if isinstance(value, dict):
        for inner, one in value.items():
            yield from _media(row, one, inner, called)
    elif isinstance(value, list):
        for one in value:
            yield from _media(row, one, key, called)
    elif isinstance(value, bytes | bytearray):
        raise DataError(
            f"{row.where}: holds its media itself; write hold_out in the recipe, which splits such rows too"
        )
    elif isinstance(value, Path) or (
        isinstance(value, str) and value and (key in called or key.removesuffix("s") in KINDS)
    ):
        if str(value).startswith("data:") or "://" in str(value):
            return
        path = (row.media_folder / value).resolve()
        if not path.is_file():
            raise DataError(
                f"{row.where}: no such {key}: {path}; name the folder of media with --media-folder, or let "
                "`finetune data check --fix` leave such rows out"
            )
        yield path


def _connected(keys: Sequence[Sequence[str]]) -> list[list[int]]:
    """Numbers of rows, those together that share a key, directly or through others."""
    parent = list(range(len(keys)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[str, int] = {}
    for row, found in enumerate(keys):
        for key in found:
            parent[root(row)] = root(first.setdefault(key, row))
    sets: dict[int, list[int]] = defaultdict(list)
    for row in range(len(keys)):
        sets[root(row)].append(row)
    return list(sets.values())


def _chance(key: str, seed: int) -> str:
    return sha256(f"{seed}/{key}".encode()).hexdigest()


def _counts(chosen: Sequence[str], labels: Sequence[str], split: str) -> Counter[str]:
    return Counter(label for one, label in zip(chosen, labels, strict=True) if one == split)


def _write(source: Source, into: Path, chosen: Sequence[str]) -> dict[str, Path]:
    """Write each row to its split's file; splits without rows have none."""
    suffix = source.path.suffix.lower() if source.path.is_file() else ""
    table = suffix in (*DELIMITERS, *SHEETS)
    suffix = ".csv" if suffix in SHEETS else suffix if suffix in (*DELIMITERS, ".json", ".ndjson") else ".jsonl"
    if suffix == ".json" and not is_array(source.path):
        suffix = ".jsonl"
    files = {split: into / f"{split}{suffix}" for split in SPLITS if split in chosen}
    for path in files.values():
        if path.resolve() == source.path.resolve():
            raise DataError(f"{path}: would be written over the rows that are split; name another folder with --into")
    for split in SPLITS:  # of an earlier call with other shares
        (into / f"{split}{suffix}").unlink(missing_ok=True)
    opened = {split: path.open("w", encoding="utf-8", newline="") for split, path in files.items()}
    try:
        write: Callable[[str, Any], None] = _table(opened, DELIMITERS[suffix]) if table else _lines(opened, suffix)
        content: Iterator[Any] = read_rows(source) if table else _raw(source)
        for split, one in zip(chosen, content, strict=True):
            write(split, one)
        if suffix == ".json":
            for file in opened.values():
                file.write("\n]\n")
    finally:
        for file in opened.values():
            file.close()
    return files


def _table(opened: Mapping[str, TextIO], delimiter: str) -> Callable[[str, Any], None]:
    writers: dict[str, Any] = {}

    def write(split: str, row: Row) -> None:
        if split not in writers:
            writers[split] = csv.DictWriter(opened[split], list(row.columns), delimiter=delimiter, lineterminator="\n")
            writers[split].writeheader()
        writers[split].writerow(row.columns)

    return write


def _lines(opened: Mapping[str, TextIO], suffix: str) -> Callable[[str, str], None]:
    begun: set[str] = set()

    def write(split: str, line: str) -> None:
        before = "" if suffix != ".json" else ",\n" if split in begun else "[\n"
        begun.add(split)
        opened[split].write(f"{before}{line}" + ("" if suffix == ".json" else "\n"))

    return write


def _raw(source: Source) -> Iterator[str]:
    """Rows of JSON as the file has them, a line each; of other formats as JSON, media relative to the folder."""
    path = source.path
    if not path.is_file() or path.suffix.lower() not in (".json", ".jsonl", ".ndjson"):
        for row in read_rows(source):
            columns = {key: _relative(value, row.media_folder) for key, value in row.columns.items()}
            yield json.dumps(columns, ensure_ascii=False)
        return
    if is_array(path):
        yield from (json.dumps(value, ensure_ascii=False) for _, value in array_of(path))
        return
    with path.open(encoding="utf-8-sig") as lines:
        yield from (line.strip() for line in lines if line.strip())


def _relative(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_relative(one, folder) for one in value]
    if isinstance(value, dict):
        return {key: _relative(one, folder) for key, one in value.items()}
    if not isinstance(value, Path):
        return value
    path = (folder / value).resolve()
    return str(path.relative_to(folder.resolve())) if path.is_relative_to(folder.resolve()) else str(path)
