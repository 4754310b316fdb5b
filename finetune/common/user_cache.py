"""Where this user's cached files are kept: below XDG_CACHE_HOME, or ~/.cache."""

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """The folder for cached files of one kind: 'features', 'media'."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "finetune" / name
