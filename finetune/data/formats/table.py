"""A table with a header line: CSV, TSV or XLSX; media beside it, named by a column."""

import codecs
import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.data.formats import NumberedRows

SHEETS = {".xlsx", ".xlsm"}
WORKBOOKS = {b"PK\3\4": "call it .xlsx", b"\xd0\xcf\x11\xe0": "save it as .xlsx, or as CSV in UTF-8"}  # by first bytes
MAX_FIELD = 2**28  # characters of one field, which may be a picture


def _encoding(name: str | None) -> str | None:
    try:
        "".encode(name or "utf-8")
    except LookupError:
        raise ValueError(f"got {str(name)[:40]!r}; write an encoding such as gb18030, big5 or shift_jis.") from None
    return name


class Options(PartOptions):
    encoding: Annotated[str | None, AfterValidator(_encoding)] = Field(
        None, description="Encoding of the text, such as gb18030; null: UTF-8, or UTF-16 with a byte order mark."
    )
    delimiter: str | None = Field(
        None, min_length=1, max_length=1, description="Character between fields; null: a tab in .tsv, else a comma."
    )
    sheet: str | None = Field(None, description="Sheet of an XLSX file; null: its first.")


def detects(path: Path) -> bool:
    return path.suffix.lower() in {".csv", ".tsv", *SHEETS} and not path.is_dir()


def rows(path: Path, options: Options) -> NumberedRows:
    if path.suffix.lower() in SHEETS:
        yield from _sheet_rows(path, options)
        return
    if options.sheet is not None:
        raise DataError(f"{path}: has no sheets, but the recipe's `sheet` names one")
    refuse_workbook(path)
    encoding = options.encoding or _marked_encoding(path)
    delimiter = options.delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
    csv.field_size_limit(MAX_FIELD)
    reader = None
    try:
        with path.open(encoding=encoding, newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            check_header(path, header := list(reader.fieldnames or ()), options)
            for number, columns in enumerate(reader):
                if not number:
                    refuse_title(path, header, columns)
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


def refuse_workbook(path: Path) -> None:
    """Raises DataError for a workbook whose file is called .csv or .tsv."""
    with path.open("rb") as file:
        if cure := WORKBOOKS.get(file.read(4)):
            raise DataError(f"{path}: a workbook, not text as {path.suffix} says; {cure}")


def _marked_encoding(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def check_header(path: Path, header: list[str], options: Options) -> None:
    """Raises DataError for a header that doesn't name the columns, each once."""
    if len(header) == 1 and ";" in header[0] and not options.delimiter:
        raise DataError(
            f"{path.name}:1: fields stand between semicolons; save it with commas, or as .tsv, or write "
            "`format: {kind: table, delimiter: ';'}`"
        )
    if any("\0" in name for name in header):
        raise DataError(f"{path.name}:1: holds NUL; is it UTF-16? `format: {{kind: table, encoding: utf-16-le}}`")
    repeated = {name for name in header if name and header.count(name) > 1}
    if repeated:
        raise DataError(f"{path.name}:1: several columns are called {min(repeated)!r}; give each its own name")


def refuse_title(path: Path, header: list[str], first: Mapping[str, Any]) -> None:
    """Raises DataError where only one column has a name, and the `first` row, by these names, fills others too."""
    named = [name for name in header if name]
    if len(header) > 2 and len(named) == 1 and first.get(""):
        raise DataError(
            f"{path.name}:1: one name, {named[0]!r}, for {len(header)} columns; if it is a title, delete the rows "
            "above the names of the columns"
        )


def _sheet_rows(path: Path, options: Options) -> NumberedRows:
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
            check_header(path, header, options)
            first = True
            for number, values in lines:
                texts = [_text(value) for value in values]
                if any(texts[len(header) :]):
                    raise DataError(f"{path.name}:{number}: more fields than the header's {len(header)}")
                if any(texts):
                    columns = dict(zip(header, texts, strict=False))
                    if first:
                        refuse_title(path, header, columns)
                    first = False
                    yield number, columns
        finally:
            book.close()
    except (DataError, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib, the XML parser and openpyxl have errors of many kinds for damaged files
        raise DataError(f"{path}: not an XLSX file that can be read ({error}); save it anew") from None


def _text(value: Any) -> str:
    """A cell as a sheet shows it: whole numbers without `.0`, dates without a time of 0:00."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).removesuffix(" 00:00:00")
