"""Kinds of media by the names of files."""

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
