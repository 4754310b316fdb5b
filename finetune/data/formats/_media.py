"""Media of rows: their kinds by the names of files, and where they are in a row's values."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".dcm"),
    "audio": (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac"),
    "video": (".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov"),
}
KINDS = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}
MOST = 0.9  # share of a column's values that decides
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}


def kind_of(name: str) -> str | None:
    """image, audio or video; None for other files."""
    return KINDS.get("." + name.lower().rpartition(".")[2])


def kind_of_values(values: Sequence[object]) -> str | None:
    """The kind of media that nearly all values of a column name or hold; None for other columns."""
    kinds = Counter(map(_kind_of_value, values))
    kind, count = kinds.most_common(1)[0] if kinds else (None, 0)
    return kind if count >= MOST * len(values) else None


def _kind_of_value(value: object) -> str | None:
    if isinstance(value, list) and value:
        return _kind_of_value(value[0])
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        value = value["path"]
    if isinstance(value, Path):
        return kind_of(value.name)
    if not isinstance(value, str) or "\n" in value[:500]:
        return None
    if value.startswith("data:"):
        kind = value[5:].partition("/")[0]
        return kind if kind in SUFFIXES else None
    return kind_of(urlsplit(value).path if "://" in value else value)


def is_hidden(name: str) -> bool:
    """Whether operating systems, archivers or Office (while a table is open) left this file behind."""
    return name.startswith((".", "~$", "__MACOSX")) or name.lower() in SYSTEM_FILES


def is_file_name(value: object, key: str) -> bool:
    """Whether a value is the path of a medium: a `Path`, or text under a key that is called after a kind of media."""
    if isinstance(value, str):
        named = value and key.removesuffix("s") in SUFFIXES
        return bool(named) and "://" not in value and not value.startswith("data:")
    return isinstance(value, Path)


def replaced(value: object, key: str, replace: Callable[[object, str], object]) -> object:
    """A value of a row with `replace(value, key)` for each value in its lists and objects; {"bytes": ..., "path": ...}
    counts as one value, of which the bytes come first.
    """
    if isinstance(value, list):
        return [replaced(item, key, replace) for item in value]
    if not isinstance(value, dict):
        return replace(value, key)
    if value and value.keys() <= {"bytes", "path"}:
        return replace(value.get("path") if value.get("bytes") is None else value["bytes"], key)
    return {name: replaced(item, name, replace) for name, item in value.items()}
