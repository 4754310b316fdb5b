"""Formats: files or folders of rows. Detected by `detects`, or named by the recipe (`data.N.format`).

Each file defines, with no torch import at module level:

    class Options(PartOptions)                            what a recipe may set; none is required
    def detects(path: Path) -> bool                       of one path, one format says yes; reads little of it
    def rows(path: Path, options) -> Iterator             (number of the row as an editor shows it, its columns: a dict)

`rows` reads as it is asked, so that memory doesn't grow with the number of rows where the container allows it. A column
that holds a medium is called image, audio or video; its value is a path (of a file below the source's media folder), an
address, a data URI, bytes, {"bytes": ..., "path": ...}, a `pathlib.Path` where the format itself vouches for the file,
or a list of these. Files of which tasks and packages know nothing begin with an underscore.

May define: REMOTE = True                                 where `path` may be a Hub id
"""
