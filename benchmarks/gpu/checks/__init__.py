"""A file a check: `check(setting, *arguments)` tells what it found in one line, raises AssertionError where it isn't
right, and Skipped where it can't be tried here.
"""


class Skipped(Exception):
    """Why a check can't be tried on this machine."""
