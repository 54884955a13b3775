"""Weights in huge pages of memory, where the system has them.

A decode step reads every weight that it touches once, in no order that the processor's table of
addresses could keep up with: in pages of 4 KiB it looks up a quarter million addresses for a GB.
"""

import ctypes
import sys
from typing import Any

import jax

PAGE_BYTES = 2 << 20
_COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1: make the pages huge that are there


def use_huge_pages(arrays: Any) -> int:
    """Move arrays of CPU devices into huge pages, in place; they keep their addresses.

    A system that cannot (not Linux, or before 6.1, or out of unbroken memory) goes on as it is.

    Args:
      arrays: a pytree of `jax.Array`.
    Returns: bytes that now lie in huge pages.
    """
    if not sys.platform.startswith("linux") or jax.default_backend() != "cpu":
        return 0
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved = 0
    for array in jax.tree.leaves(arrays):
        for shard in array.addressable_shards:
            start, size = shard.data.unsafe_buffer_pointer(), shard.data.nbytes
            first = -(-start // PAGE_BYTES) * PAGE_BYTES
            whole = (start + size) // PAGE_BYTES * PAGE_BYTES - first
            if whole > 0 and advise(first, whole, _COLLAPSE) == 0:
                moved += whole
    return moved
