import csv
import random

import openpyxl
import pytest
import tiny_formats

from finetune.common.errors import DataError
from finetune.data.formats import table

ROWS = [["image", "label", "text"], ["a.png", 'rot, "tief"', "two\nlines"], ["b.png", "红", "x"]]


def read(path, **options):
    return list(table.rows(path, table.Options(**options)))


def write(path, encoding="utf-8", delimiter=","):
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(ROWS)
    return path


@pytest.mark.parametrize(
    ("name", "written", "options"),
    [
        ("rows.csv", {}, {}),
        ("rows.csv", {"encoding": "utf-8-sig"}, {}),
        ("rows.csv", {"encoding": "utf-16"}, {}),
        ("rows.csv", {"encoding": "gb18030"}, {"encoding": "gb18030"}),
        ("rows.csv", {"encoding": "utf-16-le"}, {"encoding": "utf-16-le"}),
        ("rows.tsv", {"delimiter": "\t"}, {}),
        ("rows.csv", {"delimiter": ";"}, {"delimiter": ";"}),
        ("rows.tsv", {"delimiter": ","}, {"delimiter": ","}),
    ],
)
def test_every_encoding_and_delimiter_gives_the_same_rows(name, written, options, tmp_path):
    rows = read(write(tmp_path / name, **written), **options)
    assert rows == [(3, dict(zip(ROWS[0], ROWS[1], strict=True))), (4, dict(zip(ROWS[0], ROWS[2], strict=True)))]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("a,b\n红,1\n".encode("gb18030"), {}, r"not UTF-8 \(byte 4\); .*encoding: gb18030"),
        ("a,b\n".encode("utf-16-le"), {}, "holds NUL; is it UTF-16"),
        (b"a,b\n\x80\xff,1\n", {"encoding": "gb18030"}, "not gb18030"),
        (b"a;b\n1;2\n", {}, "between semicolons"),
        (b"a,b,a\n1,2,3\n", {}, "several columns are called 'a'"),
        (b"a,b\n1,2,3\n", {}, r"rows.csv:2: more fields than the header's 2"),
        (b'a,b\n"1,2\n', {}, "unexpected end of data"),
        (b"a,b\n1,2\n", {"sheet": "Sheet"}, "has no sheets"),
    ],
)
def test_a_wrong_table_says_what_is_wrong(content, options, message, tmp_path):
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "rows.csv", **options)


@pytest.mark.parametrize("name", ["latin-99", "hex", ""])
def test_an_encoding_that_there_is_not_is_refused_by_the_recipe(name):
    if name:
        with pytest.raises(ValueError, match="write an encoding such as gb18030"):
            table.Options(encoding=name)
    with pytest.raises(ValueError, match=r"at most 1 character|at least 1 character"):
        table.Options(delimiter=name * 2)


def test_a_field_holds_a_whole_picture(tmp_path):
    long = "data:image/png;base64," + "A" * 2**20
    (tmp_path / "rows.csv").write_text(f'image,label\n"{long}",red\n')
    assert read(tmp_path / "rows.csv") == [(2, {"image": long, "label": "red"})]


def test_cells_of_a_sheet_are_read_as_they_are_shown(tmp_path):
    import datetime

    book = openpyxl.Workbook()
    first, second = book.active, book.create_sheet("二月")
    first.append(["image", "label", None])
    first.append(["a.png", 3, None])
    first.append([None, None, None])
    first.append(["b.png", 2.5, None])
    second.append(["image", "day", "good"])
    second.append(["c.png", datetime.datetime(2024, 2, 1), True])
    book.save(tmp_path / "rows.xlsx")
    path = tmp_path / "rows.xlsx"
    found = [(number, row["image"], row["label"]) for number, row in read(path)]
    assert found == [(2, "a.png", "3"), (4, "b.png", "2.5")]
    assert read(path, sheet="二月") == [(2, {"image": "c.png", "day": "2024-02-01", "good": "TRUE"})]
    with pytest.raises(DataError, match="no sheet 'März'; there are: Sheet, 二月"):
        read(path, sheet="März")
    with pytest.raises(DataError, match="has no `encoding`"):
        read(path, encoding="gb18030")


def test_a_sheet_with_changed_bytes_is_read_or_a_data_error(tmp_path):
    """Compressed data, flags of encryption and versions of ZIP, XML: each breaks with an error of its own."""
    path = tiny_formats.sheet(tmp_path)
    whole, generator, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(60):
        content = bytearray(whole)
        for place in generator.sample(range(len(whole)), 4):
            content[place] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        try:
            read(path)
        except DataError as error:
            refused += 1
            assert "not an XLSX file that can be read" in str(error)
    assert refused > 20


@pytest.mark.parametrize("cut", [0, 10, 2000, 4000])
def test_a_broken_sheet_is_a_data_error(cut, tmp_path):
    path = tiny_formats.sheet(tmp_path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match="not an XLSX file"):
        read(path)


@pytest.mark.parametrize("suffix", [".csv", ".xlsx"])
def test_a_title_above_the_header_is_named(suffix, tmp_path):
    rows, path = [["Calls of May", "", ""], ["audio", "intent", "agent"], ["1.ogg", "refund", "Li"]], tmp_path / "a"
    path = path.with_suffix(suffix)
    if suffix == ".csv":
        path.write_text("\n".join(map(",".join, rows)), encoding="utf-8")
    else:
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)
        book.save(path)
    with pytest.raises(DataError, match=r"a\.(csv|xlsx):1: one name, 'Calls of May', for 3 columns; if it is a title"):
        read(path)


def test_one_named_column_beside_empty_ones_and_an_index_without_a_name_are_read(tmp_path):
    for text, row in (("text,,\nyes,,\n", {"text": "yes", "": ""}), (",text\n0,yes\n", {"": "0", "text": "yes"})):
        path = tmp_path / "rows.csv"
        path.write_text(text, encoding="utf-8")
        assert read(path) == [(2, row)]


@pytest.mark.parametrize(("start", "cure"), [(b"PK\3\4", "call it .xlsx"), (b"\xd0\xcf\x11\xe0", "save it as .xlsx")])
def test_a_workbook_called_csv_is_named(start, cure, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(start + bytes(20))
    with pytest.raises(DataError, match=f"a workbook, not text as .csv says; {cure}"):
        read(path)
