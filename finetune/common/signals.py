"""Signals that end a command, and what their handlers may write. Imports nothing that takes time."""

import os
import signal

# Ctrl-C; a machine or session that is taken away; a terminal that is closed (not on Windows).
SIGNALS = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]


def write_from_handler(text: str) -> None:
    """Write a line to stderr from a signal handler, which may have interrupted whoever holds the locks of rich and of
    Python's streams. Where the terminal is gone, what would be written there from now on is dropped, so that nothing
    fails for it.
    """
    try:
        os.write(2, f"\n{text}\n".encode())
    except OSError:
        nothing = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            if os.path.sameopenfile(stream, 2):
                os.dup2(nothing, stream)
        os.close(nothing)
