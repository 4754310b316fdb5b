"""Media of rows: their kinds by the names of files, and where they are in a row's values."""

from collections.abc import Callable
from pathlib import Path

SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".dcm"),
    "audio": (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac"),
    "video": (".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov"),
}
KINDS = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}


def kind_of(name: str) -> str | None:
    """image, audio or video; None for other files."""
    return KINDS.get("." + name.lower().rpartition(".")[2])


def is_hidden(name: str) -> bool:
    """Whether operating systems or archivers left this file behind."""
    return name.startswith((".", "__MACOSX")) or name.lower() in SYSTEM_FILES


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
