"""Files of rows with any content, through each format: rows, or a DataError that names the file, within bounds."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.common.errors import DataError
from finetune.common.registry import part_names
from finetune.data.check.lenient import lenient_rows
from finetune.data.preferences import sample_of
from finetune.recipe.parts import FormatPart, TaskPart
from finetune.recipe.schema import Source

pytestmark = pytest.mark.slow

KEYS = ("id", "image", "audio", "video", "images", "label", "caption", "text", "prompt", "question", "answer", "chosen")
KEYS += (
    "rejected",
    "messages",
    "conversations",
    "role",
    "from",
    "value",
    "content",
    "type",
    "image_url",
    "url",
    "system",
)
KEYS += (
    "input_audio",
    "data",
    "annotations",
    "image_id",
    "file_name",
    "bytes",
    "path",
    "references",
    "desirable",
    "items",
)
WORDS = (
    "user",
    "assistant",
    "human",
    "gpt",
    "tool",
    "image",
    "text",
    "a.png",
    "../x.png",
    "data:image/png;base64,AAAA",
)
WORDS += ("http://[::1", "file:///etc/passwd", "<image>", "\ud800", "\0", "é🙂\u202e", "\x1b[2J", "1e999", "")
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.sampled_from(WORDS), st.text(max_size=4)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=3)), inner, max_size=5),
    ),
    max_leaves=12,
)
TURNS = st.lists(
    st.fixed_dictionaries({"role": VALUES | st.sampled_from(["user", "assistant"]), "content": VALUES}), max_size=3
)
SPOKEN = st.lists(
    st.fixed_dictionaries({"from": VALUES | st.sampled_from(["human", "gpt"]), "value": VALUES}), max_size=3
)
ROWS = st.lists(
    st.one_of(
        VALUES,
        st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6),
        st.fixed_dictionaries({"messages": TURNS}, optional={"image": VALUES, "images": VALUES}),
        st.fixed_dictionaries({"conversations": SPOKEN}, optional={"image": VALUES, "system": VALUES}),
    ),
    max_size=4,
)
COCO = st.fixed_dictionaries(
    {"images": VALUES | st.lists(st.fixed_dictionaries({"id": VALUES, "file_name": st.just("a.png")}), max_size=3)}
)
COCO = st.builds(
    lambda images, notes: images | {"annotations": notes},
    COCO,
    VALUES | st.lists(st.fixed_dictionaries({"image_id": VALUES, "caption": VALUES | st.just("a")}), max_size=3),
)


def json_text(value):
    return json.dumps(value).encode()


def lines(rows):
    return b"\n".join(map(json_text, rows))


def table(rows, delimiter=","):
    texts = [delimiter.join(str(cell) for cell in (row.values() if isinstance(row, dict) else [row])) for row in rows]
    return ("image,label\n" + "\n".join(texts)).replace(",", delimiter).encode("utf-8", "surrogatepass")


def tar(rows):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, row in enumerate(rows):
            for suffix, content in (("json", json_text(row)), ("txt", str(row).encode("utf-8", "replace"))):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def sheet(rows):
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(["image", "label"])
    for row in rows:
        book.active.append([str(row).encode("ascii", "replace").decode().translate(dict.fromkeys(range(32), "?")), 1])
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


def parquet(rows):
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(
        pyarrow.table({"image": [f"{n}.png" for n in range(len(rows))], "label": list(map(ascii, rows))}), file
    )
    return file.getvalue()


FILES = {  # name of the file: rows as its content
    "rows.json": st.one_of(ROWS.map(json_text), COCO.map(json_text), VALUES.map(json_text)),
    "rows.jsonl": ROWS.map(lines),
    "rows.csv": ROWS.map(table),
    "rows.tsv": ROWS.map(lambda rows: table(rows, "\t")),
    "rows.tar": ROWS.map(tar),
    "rows.xlsx": ROWS.map(sheet),
    "rows.parquet": ROWS.map(parquet),
}
TASKS = {
    "chat": {},
    "classify": {},
    "caption": {},
    "vqa": {},
    "extract": {"fields": {"a": "text"}},
    "score": {},
    "rank": {},
    "ground": {},
    "answer": {},
}


@st.composite
def damaged(draw, content):
    """The content, in half of the cases with bytes cut, changed or put in."""
    data = bytearray(draw(content))
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 3)))):
        at = draw(st.integers(0, 1000)) * len(data) // 1000  # the length of archives varies
        match draw(st.integers(0, 3)):
            case 0:
                del data[at:]
            case 1:
                data[at : at + 4] = draw(st.binary(min_size=1, max_size=4))
            case 2:
                data[at:at] = draw(
                    st.sampled_from((b'"', b"\0", b"\xff\xfe", b"{", b"[" * 3000, b"\r", b"9" * 5000, b"\\ud800"))
                )
            case _:
                data[at:at] = bytes(data[:at])[-300:]
    return bytes(data)


def read(path, kind, task):
    """What `data check` and training do with each row before media are opened."""
    source = Source(path=path, format=FormatPart.of(kind) if kind else None, task=TaskPart.of(task, **TASKS[task]))
    faults = []
    for row in lenient_rows(source, lambda *fault: faults.append(fault), 10**6):
        try:
            sample_of(row, source.task)
        except DataError as error:
            assert str(error).startswith((row.where, str(path), path.name)), error
    for number, text, raw in faults:
        assert text and isinstance(number, int) and isinstance(raw, str)


def outcomes_of(name, folder, examples, derandomize):
    path = Path(folder) / name
    kinds = [None, *part_names(FormatPart.folder)]
    count = 0

    @settings(
        max_examples=examples,
        derandomize=derandomize,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(FILES[name]), st.sampled_from(kinds), st.sampled_from(sorted(TASKS)))
    def spoil(content, kind, task):
        nonlocal count
        path.write_bytes(content)
        try:
            read(path, kind, task)
        except DataError as error:
            assert path.name in str(error), error
        count += 1

    spoil()
    return count


@pytest.mark.parametrize("name", FILES)
def test_any_content_is_rows_or_a_data_error(name, tmp_path, full, tried):
    count = outcomes_of(name, tmp_path, 2000 if full else 25, not full)
    tried(f"{count} files {name} by each format", "rows, or errors that name them")
