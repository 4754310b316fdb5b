"""Memory that runs out: what says so, and batches that are halved where it does. Imports no torch."""

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from finetune.common.errors import OutOfMemory

# torch's allocators raise RuntimeErrors, cuBLAS, oneDNN (which knows what it can compute before it creates a primitive)
# and C++ some of their own; libraries that don't fit can't be imported.
RAISED = (MemoryError, RuntimeError, OSError, ImportError)
MESSAGE = re.compile(
    "(out of|allocate) memory|bad_alloc|ALLOC_FAILED|failed to map segment|could not create a primitive$"
)
BY_PLAN = "`finetune plan RECIPE` says what each takes"
TRAINING = (
    "in this order: train.dequantize_once: false, train.checkpoint_every_n_layers: 1, quantize: nf4, optimizer: "
    "paged_adamw_8bit, fewer or smaller media and shorter text in a row, a smaller train.tokens_per_batch with more "
    f"train.accumulate, a smaller LLM; {BY_PLAN}"
)
ENCODING = f"smaller media (media.*), train.encode_batch: 1, fewer tiles or frames, a smaller encoder; {BY_PLAN}"
ANSWERING = f"in this order: evaluate.batch: 1, a smaller evaluate.max_new_tokens, quantize: nf4; {BY_PLAN}"
MERGING = f"close other programs, fewer merge.rows, a smaller evaluate.batch, or more memory; {BY_PLAN}"
Item = TypeVar("Item")
Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    by_message = isinstance(error, RuntimeError | ImportError) and MESSAGE.search(str(error))
    return isinstance(error, MemoryError) or bool(by_message)


@contextmanager
def enough_memory(doing: str, advice: str) -> Iterator[None]:
    """Raises OutOfMemory, with `advice`, where memory runs out in the block."""
    try:
        yield
    except RAISED as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory {doing}. To need less, {advice}") from error


def attempt(compute: Callable[[], Result]) -> Result | None:
    """None where memory runs out. What the attempt held is free by then."""
    try:
        return compute()
    except RAISED as error:
        if not is_out_of_memory(error):
            raise
    from accelerate.utils import release_memory

    release_memory()  # here, as an exception keeps the tensors of its frames
    return None


class Halving:
    """Items computed in batches, which are halved, for good and with a line that says so, where memory runs out.
    `doing`: what they're computed for; `key`: of the recipe, how many at once.
    """

    def __init__(self, doing: str, key: str, advice: str) -> None:
        self.doing, self.key, self.advice = doing, key, advice
        self.most: int | None = None  # at once, by what was tried

    def over(
        self, items: Sequence[Item], batch: int, compute: Callable[[Sequence[Item]], Sequence[Result]]
    ) -> Iterator[tuple[Item, Result]]:
        """(item, result) of all items, in their order. Raises OutOfMemory where one alone takes too much."""
        from finetune.common.progress import console

        begin = 0
        while begin < len(items):
            some = items[begin : begin + min(batch, self.most or batch)]
            found = attempt(partial(compute, some))
            if found is not None:
                yield from zip(some, found, strict=True)
                begin += len(some)
            elif len(some) == 1:
                raise OutOfMemory(f"out of memory {self.doing}, for one alone. To need less, {self.advice}")
            else:
                self.most = len(some) // 2
                console.print(
                    f"out of memory {self.doing}: {self.most} at once from here on, not {len(some)}. For the next run "
                    f"write {self.key}: {self.most}"
                )
