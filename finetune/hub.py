"""Loading from the Hub or a folder, with errors that a user can act on."""

from collections.abc import Iterator
from contextlib import contextmanager

from finetune.errors import ModelError


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn what transformers and the Hub raise on a wrong name, revision, file or connection into one ModelError."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:300] if lines else type(error).__name__
        raise ModelError(f"{what} can't be loaded: {reason}") from error
