"""Memory that runs out: what says so, and batches that are halved where it does. Imports no torch."""

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from finetune.common.errors import OutOfMemory

# torch's allocators raise RuntimeErrors, cuBLAS and C++ some of their own.
SAID = re.compile("(out of|allocate) memory|bad_alloc|ALLOC_FAILED")
Item = TypeVar("Item")
Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(SAID.search(str(error))))


@contextmanager
def enough_memory(doing: str, advice: str) -> Iterator[None]:
    """Raises OutOfMemory, with `advice`, where memory runs out in the block."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory {doing}: {advice}") from error


def attempt(compute: Callable[[], Result]) -> Result | None:
    """None where memory runs out. What the attempt held is free by then."""
    try:
        return compute()
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
    from accelerate.utils import release_memory

    release_memory()  # here, as an exception keeps the tensors of its frames
    return None


class Halving:
    """Items computed in batches of `size`, which is halved, for good and with a line that says so, where memory runs
    out. `doing`: what they're computed for; `key`: of the recipe, the size.
    """

    def __init__(self, size: int, doing: str, key: str, advice: str) -> None:
        self.size, self.doing, self.key, self.advice = size, doing, key, advice

    def over(
        self, items: Sequence[Item], compute: Callable[[Sequence[Item]], Sequence[Result]]
    ) -> Iterator[tuple[Item, Result]]:
        """(item, result) of all items, in their order. Raises OutOfMemory where one alone takes too much."""
        from finetune.common.progress import console

        begin = 0
        while begin < len(items):
            batch = items[begin : begin + self.size]
            found = attempt(partial(compute, batch))
            if found is not None:
                yield from zip(batch, found, strict=True)
                begin += len(batch)
            elif len(batch) == 1:
                raise OutOfMemory(f"out of memory {self.doing}, for one alone: {self.advice}")
            else:
                self.size = len(batch) // 2
                console.print(
                    f"out of memory {self.doing}: {self.size} at once from here on, not {len(batch)}. For the next "
                    f"run write {self.key}: {self.size}"
                )
