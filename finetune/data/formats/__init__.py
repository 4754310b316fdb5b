"""Formats: files or folders of rows. Detected by `detects`, or named by the recipe (`data.N.format`).

Each file defines, with no torch import at module level:

    class Options(PartOptions)                      what a recipe may set; none is required
    def detects(path: Path) -> bool                 exactly one format says yes to a path; reads little of it
    def rows(path: Path, options) -> NumberedRows   one row after the other

`rows` yields lazily: memory doesn't grow with the number of rows if the container allows it. A column that holds a
medium is called image, audio or video; its value is a path (of a file below the source's media folder), an address, a
data URI, bytes, {"bytes": ..., "path": ...}, a `pathlib.Path` if the format itself vouches for the file, or a list of
these. Modules beginning with an underscore know nothing of tasks.

May define: REMOTE = True                           `path` may be a Hub id
            ROWS_ARE_FILES = True                   each row is one file of a folder, and is named after it
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

Columns: TypeAlias = dict[str, Any]  # a row: a file's columns or keys and their values, mostly JSON-like
NumberedRows: TypeAlias = Iterator[tuple[int, Columns]]  # with the number of each row, as an editor shows it
