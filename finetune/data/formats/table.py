"""A table with a header line: CSV, TSV or XLSX; media beside it, named by a column."""

import codecs
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions

SHEETS = {".xlsx", ".xlsm"}
FIELD = 2**28  # characters of one field, at most: a picture may stand in one


def _encoding(name: str | None) -> str | None:
    try:
        "".encode(name or "utf-8")
    except LookupError:
        raise ValueError(f"got {str(name)[:40]!r}; write an encoding such as gb18030, big5 or shift_jis.") from None
    return name


class Options(PartOptions):
    encoding: Annotated[str | None, AfterValidator(_encoding)] = Field(
        None, description="Of the text, gb18030 for instance; null: UTF-8, or UTF-16 with a byte order mark."
    )
    delimiter: str | None = Field(
        None, min_length=1, max_length=1, description="Stands between fields; null: a tab in .tsv, else a comma."
    )
    sheet: str | None = Field(None, description="Name of the sheet of an XLSX file; null: its first.")


def detects(path: Path) -> bool:
    return path.suffix.lower() in {".csv", ".tsv", *SHEETS} and not path.is_dir()


def rows(path: Path, options: Options) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix.lower() in SHEETS:
        yield from _sheet_rows(path, options)
        return
    if options.sheet is not None:
        raise DataError(f"{path}: has no sheets, but the recipe's `sheet` names one")
    encoding = options.encoding or _marked_encoding(path)
    delimiter = options.delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
    csv.field_size_limit(FIELD)
    reader = None
    try:
        with path.open(encoding=encoding, newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            _check_header(path, list(reader.fieldnames or ()), options)
            for columns in reader:
                if None in columns:
                    raise DataError(f"{path.name}:{reader.line_num}: more fields than the header's {len(columns) - 1}")
                yield reader.line_num, columns
    except UnicodeError as error:
        if options.encoding:
            raise DataError(f"{path}: not {encoding} ({error})") from None
        raise DataError(
            f"{path}: not UTF-8 (byte {getattr(error, 'start', 0)}); save it as UTF-8, or name its encoding: "
            "`format: {kind: table, encoding: gb18030}`"
        ) from None
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num if reader else 1}: {error}") from None


def _marked_encoding(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _check_header(path: Path, header: list[str], options: Options) -> None:
    if len(header) == 1 and ";" in header[0] and not options.delimiter:
        raise DataError(
            f"{path.name}:1: fields stand between semicolons; save it with commas, or as .tsv, or write "
            "`format: {kind: table, delimiter: ';'}`"
        )
    if any("\0" in name for name in header):
        raise DataError(f"{path.name}:1: holds NUL; is it UTF-16? `format: {{kind: table, encoding: utf-16-le}}`")
    twice = {name for name in header if name and header.count(name) > 1}
    if twice:
        raise DataError(f"{path.name}:1: more than one column is called {min(twice)!r}; give each its own name")


def _sheet_rows(path: Path, options: Options) -> Iterator[tuple[int, dict[str, Any]]]:
    import zipfile
    from xml.etree.ElementTree import ParseError

    import openpyxl

    if options.encoding or options.delimiter:
        raise DataError(f"{path}: XLSX has no `encoding` and no `delimiter`; drop them from the recipe")
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            if options.sheet is not None and options.sheet not in book.sheetnames:
                raise DataError(f"{path}: no sheet {options.sheet!r}; there are: {', '.join(book.sheetnames)}")
            sheet = book[options.sheet or book.sheetnames[0]]
            lines = enumerate(sheet.iter_rows(values_only=True), 1)
            header = [_text(value) for value in next(lines, (1, ()))[1]]
            _check_header(path, header, options)
            for number, values in lines:
                texts = [_text(value) for value in values]
                if any(texts[len(header) :]):
                    raise DataError(f"{path.name}:{number}: more fields than the header's {len(header)}")
                if any(texts):
                    yield number, dict(zip(header, texts, strict=False))
        finally:
            book.close()
    except (zipfile.BadZipFile, OSError, KeyError, ValueError, ParseError, EOFError, IndexError) as error:
        raise DataError(f"{path}: not an XLSX file that can be read ({error}); save it anew") from None


def _text(value: Any) -> str:
    """A cell as a sheet shows it: numbers without a needless `.0`, days without a needless time."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).removesuffix(" 00:00:00")
