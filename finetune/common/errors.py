"""Every error a user can cause, as one tree.

FinetuneError                 exit status 1; its text is all that the command line prints
├─ RecipeError           2    the recipe, an option of the command line, or a part's options
├─ DataError             2    a row, a file of rows, a split
│  ├─ MissingColumn      2    a column that a row lacks
│  └─ MediaError         2    a picture, recording or video that can't be decoded or is out of bounds
├─ ModelError            1    an LLM, an encoder or a projector that can't be built or don't fit together
├─ TrainingError         1    a loss or gradient that isn't finite, a checkpoint that can't be continued
│  └─ Interrupted    128+n    stopped by signal n after a whole checkpoint; `--resume` continues
├─ OutOfMemory           1    memory that runs out where no batch can be halved
├─ ArtifactError         1    a run folder, adapter or merged folder that is missing, broken or foreign
│  ├─ MergeRefused       3    the merged model isn't what was trained, or is only the base
│  └─ ExportRefused      3    a target that can't hold this model, or answers otherwise than it
└─ PublishError          1    a repository that can't be written or read, or what must not be published

A message says where (file, row, key), what was seen, and what to do next. What to change is named as the caller writes
it: `--overwrite` on the command line, `overwrite=True` in Python; see `option`.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RESUME = ("--resume", "resume=True")
OVERWRITE = ("--overwrite", "overwrite=True")
RUN = ("--run DIR", "run=")
KEPT_MARKS = "\n\t\u200c\u200d\u3000\xa0"
_flags = False


def option(flag: str, parameter: str) -> str:
    """How a message names an option: `flag` on the command line, `parameter` to callers from Python."""
    return flag if _flags else parameter


def given(name: str, value: object) -> str:
    """How a message names an option with its value: '--hold-out 2' on the command line, 'hold_out=2' in Python."""
    return option(f"--{name.replace('_', '-')} {value}", f"{name}={value}")


@contextmanager
def options_as_flags() -> Iterator[None]:
    """Messages made inside the block name flags: for the command line."""
    global _flags
    before, _flags = _flags, True
    try:
        yield
    finally:
        _flags = before


def escaped(text: str) -> str:
    """Text from files as a terminal may show it: escape sequences, marks that turn its direction and others that can't
    be seen are spelled out; line breaks, tabs and joiners of letters stay.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in KEPT_MARKS else ascii(one)[1:-1] for one in text)


class FinetuneError(Exception):
    exit_status = 1


class RecipeError(FinetuneError):
    exit_status = 2


class DataError(FinetuneError):
    exit_status = 2


class MissingColumn(DataError):
    def __init__(self, message: str, column: str) -> None:
        super().__init__(message)
        self.column = column


class MediaError(DataError):
    pass


class ModelError(FinetuneError):
    pass


class TrainingError(FinetuneError):
    pass


class Interrupted(TrainingError):
    """`signal_number`: 2 after Ctrl-C, 15 where a machine is taken away; `run`: the folder that `--resume` goes on
    with.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGINT, run: Path | None = None) -> None:
        super().__init__(message)
        self.signal_number = int(signal_number)
        self.run = run
        self.exit_status = 128 + self.signal_number


class OutOfMemory(FinetuneError):
    pass


class ArtifactError(FinetuneError):
    pass


class MergeRefused(ArtifactError):
    exit_status = 3


class ExportRefused(ArtifactError):
    exit_status = 3


class PublishError(FinetuneError):
    pass
