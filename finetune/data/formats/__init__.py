"""Formats: files of rows. Detected by `detects`, or named by the recipe (`data.N.format`).

Each file defines, with no torch import at module level:

    def detects(path: Path) -> bool
    def rows(path: Path) -> Iterator[tuple[int, dict]]    (number of the row as an editor shows it, its columns)
"""
