"""A CSV or TSV file with a header line; media beside it, named by a column."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import DataError


def detects(path: Path) -> bool:
    return path.suffix.lower() in {".csv", ".tsv"}


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header = list(reader.fieldnames or ())
            if len(header) == 1 and ";" in header[0]:
                raise DataError(f"{path.name}:1: fields stand between semicolons; save it with commas, or as .tsv")
            for columns in reader:
                if None in columns:
                    raise DataError(f"{path.name}:{reader.line_num}: more fields than the header's {len(columns) - 1}")
                yield reader.line_num, columns
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}") from None
