"""Arrays in huge pages are what they were, where they were."""

import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.models.moe.huge_pages import PAGE_BYTES, use_huge_pages


def _huge_bytes(address: int) -> int:
    """Of the mapping that an address lies in, as Linux counts them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    return 0


def test_large_arrays_move_into_huge_pages_and_keep_values_and_address():
    values = np.random.default_rng(0).integers(0, 255, 8 * PAGE_BYTES, np.uint8)
    array = jnp.asarray(values.copy() + np.uint8(1))
    before = array.unsafe_buffer_pointer()
    moved = use_huge_pages({"large": array})
    if not sys.platform.startswith("linux") or not moved:
        pytest.skip("this system has no huge pages to give")
    assert moved in (7 * PAGE_BYTES, 8 * PAGE_BYTES)
    assert _huge_bytes(before + 4 * PAGE_BYTES) >= moved
    assert array.unsafe_buffer_pointer() == before
    np.testing.assert_array_equal(array, values + np.uint8(1))


def test_small_arrays_stay_where_they_are():
    small = [jnp.arange(5), jnp.ones((3, 7))]
    assert use_huge_pages(small) == 0
    assert small[0].tolist() == [0, 1, 2, 3, 4]
