"""Tables of rows that are kept between runs: each an Arrow file in a folder of the user's cache, which the hash of what
made it names. They are read as mapped files, so that a process needs no memory of its own for them.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from time import time

import pyarrow as pa

from finetune.common.errors import DataError

BATCH = 1000  # rows written at once; fewer stay in memory, since they are soon made anew
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
    writing = _new_folder(folder) if folder and first and (always or first[0].num_rows == BATCH) else None
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
    while chunk := list(islice(rows, BATCH)):
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
