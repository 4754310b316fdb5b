"""Tables of rows that are kept between runs: each an Arrow file in a folder of the user's cache, which the hash of what
made it names. They are read as mapped files, so that a process needs no memory of its own for them.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain, islice, pairwise
from pathlib import Path
from time import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune.common.errors import DataError

BATCH = 1000  # rows; fewer stay in memory, since they are soon made anew
AT_ONCE = 4000  # rows that are written; of each batch of an opened table some kilobytes are in memory
UNUSED_SECONDS = 30 * 24 * 3600.0
FILE = "rows.arrow"


def opened(folder: Path) -> pa.Table | None:
    """The table of a folder; None where there is none that can be read."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(folder / FILE))).read_all()
        os.utime(folder)  # it is in use
    except (OSError, pa.ArrowInvalid):
        return None
    return table


def taken(column: pa.ChunkedArray, places: npt.NDArray[np.integer[Any]]) -> pa.ChunkedArray:
    """The values of a column in these places, in their order. Arrow's own `take` copies the whole column before, where
    it has several chunks.
    """
    if len(places) == 0:
        return column.slice(0, 0)
    first, last = int(places[0]), int(places[-1])
    if last - first == len(places) - 1 and np.array_equal(places, np.arange(first, last + 1)):
        return column.slice(first, len(places))
    ends = np.cumsum([len(chunk) for chunk in column.chunks])
    chunks = np.searchsorted(ends, places, "right")
    borders = [0, *(np.flatnonzero(np.diff(chunks)) + 1).tolist(), len(places)]
    if len(borders) > 2 * column.num_chunks + 2:  # in no order
        order = np.argsort(places, kind="stable")
        return taken(column, places[order]).take(pa.array(np.argsort(order, kind="stable")))
    parts = []
    for begin, end in pairwise(borders):
        chunk = column.chunk(int(chunks[begin]))
        parts.append(chunk.take(pa.array(places[begin:end] - (ends[chunks[begin]] - len(chunk)))))
    return pa.chunked_array(parts, column.type)


def keep(
    folder: Path | None,
    schema: pa.Schema,
    rows: Iterable[Mapping[str, object]],
    finish: Callable[[Path], bool] = lambda folder: True,
    *,
    always: bool = False,
) -> pa.Table:
    """Rows as a table, kept in `folder`; None keeps nothing. `finish` may write more files into the folder, and says
    whether it is kept. Fewer than BATCH rows are only kept where `always` says so. Raises DataError where it can't be
    written, and what `rows` raise.
    """
    batches = _batches(schema, rows)
    first = list(islice(batches, 1))
    writing = _new_folder(folder) if folder and first and (always or first[0].num_rows >= BATCH) else None
    if folder is None or writing is None:
        return pa.Table.from_batches([*first, *batches], schema)
    try:
        with pa.OSFile(str(writing / FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in chain(first, batches):
                writer.write_batch(batch)
        table = opened(writing)
        assert table is not None
        if finish(writing):
            _remove_unused(folder.parent)
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # another process has just kept the same
                os.replace(writing, folder)
        return table
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(f"{folder}: can't be written ({error}); XDG_CACHE_HOME names another folder") from None
    finally:
        shutil.rmtree(writing, ignore_errors=True)  # what is mapped of it stays


def _batches(schema: pa.Schema, rows: Iterable[Mapping[str, object]]) -> Iterator[pa.RecordBatch]:
    rows = iter(rows)
    while chunk := list(islice(rows, AT_ONCE)):
        yield pa.RecordBatch.from_pylist(chunk, schema)


def _new_folder(folder: Path) -> Path | None:
    """A folder to write in; None where this user can't write there."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    except OSError:
        return None


def _remove_unused(parent: Path) -> None:
    for folder in parent.iterdir():
        try:
            if folder.stat().st_mtime < time() - UNUSED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # another process was quicker
