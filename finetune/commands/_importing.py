"""Signals that come while the program imports, which takes seconds: libraries that are interrupted there catch the
exception, or go on half imported.
"""

import os
from types import FrameType


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler: ends the process where it is importing, otherwise raises KeyboardInterrupt."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"stopped\n")
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt
