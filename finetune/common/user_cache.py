"""Where this user's cached files are kept: below XDG_CACHE_HOME, or ~/.cache."""

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """The folder for cached files of one kind: 'features', 'media'."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "finetune" / name
