"""What a call needs in memory."""

import tracemalloc
from collections.abc import Callable

import pyarrow as pa

_POOLS: list[pa.MemoryPool] = []  # what was allocated from them may still be freed


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that Python and NumPy hold during a call, and the most that Arrow does."""
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    _POOLS.append(pool)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
