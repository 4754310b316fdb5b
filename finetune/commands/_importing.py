"""Signals that come while the program imports, which takes seconds: libraries that are interrupted there catch the
exception, or go on half imported.
"""

import os
from collections.abc import Callable
from types import FrameType

advice: list[Callable[[], str]] = [str]  # the last says how to go on


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler: ends the process where it is importing, otherwise raises KeyboardInterrupt."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"stopped{advice[-1]()}\n".encode(errors="replace"))
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt
