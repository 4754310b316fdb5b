"""Free space on disks: checked before much is written, and reported when it runs out."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.common.errors import RESUME, FinetuneError, TrainingError, option

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
UNUSABLE = {  # of a file or folder that somebody has named
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.EINVAL),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
}
# Of safetensors and torch, which raise errors of their own: by the system's number, or for any write that failed.
WRITE_FAILED = re.compile(
    rf"os error ({'|'.join(map(str, sorted(FULL)))})\b|PytorchStreamWriter|iostream error|unexpected pos"
)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def refuse_full(folder: Path, needed: int, what: str) -> None:
    """Raises TrainingError where `needed` bytes for `what` don't fit onto the folder's disk."""
    free = free_bytes(folder)
    if needed > free:
        raise TrainingError(
            f"{folder}: {what} need {needed:,} bytes ({needed / 2**30:.2f} GiB), and {free:,} are free "
            f"({free / 2**30:.2f} GiB): make room, or choose another disk"
        )


@contextmanager
def writing(folder: Path, what: str, then: str = "") -> Iterator[None]:
    """Raises TrainingError where the disk gets full in the block. `then`: what to do with room, if not to resume."""
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number not in FULL and not WRITE_FAILED.search(str(error)):
            raise
        free = free_bytes(folder)
        raise TrainingError(
            f"{folder}: no room for {what}: {free:,} bytes are free, and a file may be no larger than the system "
            f"allows. What was there before is whole: make room, and {then or f'{option(*RESUME)} goes on'}"
        ) from error
