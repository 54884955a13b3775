"""Numbers are of their kind, finite and bounded."""

import math

import numpy as np
import pytest

from cmjax.inputs import check_count, check_number, check_seed, shown, whole_numbers


@pytest.mark.parametrize("value", [1, 10**9, np.int64(7)])
def test_counts_in_range_pass(value):
    check_count("n", value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "n must be at least 1, got 0"),
        (-(10**30), "n must be at least 1"),
        (10**9 + 1, "n must be at most 1,000,000,000, got 1000000001"),
        (10**5000, "n must be at most 1,000,000,000, got a number of 5001 digits"),
        (True, "n must be a whole number, got True"),
        (2.0, "n must be a whole number, got 2"),
        ("3", "n must be a whole number, got '3'"),
        (None, "n must be a whole number, got None"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_other_counts_do_not(value, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        check_count("n", value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math.nan, "x must be a finite number, got nan"),
        (math.inf, "x must be a finite number, got inf"),
        (0.0, "x must be positive, got 0"),
        (-1, "x must be positive, got -1"),
        (3.5, "x must be at most 3, got 3.5"),
        (10**400, "x must be at most 3, got 1000"),
        (True, "x must be a number"),
        ("1", "x must be a number"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_other_numbers_do_not_pass(value, said):
    check_number("x", 2.5, above=0, most=3)
    with pytest.raises(ValueError, match=f"^{said}"):
        check_number("x", value, above=0, most=3)


@pytest.mark.parametrize("value", [-1, 2**32, 10**20, 1.0, True])
def test_seeds_are_what_generators_take(value):
    check_seed("seed", 2**32 - 1)
    with pytest.raises(ValueError, match="seed must be 0 to 4294967295"):
        check_seed("seed", value)


def test_whole_numbers_of_a_file_keep_their_values():
    found = whole_numbers(np.array([3, 0], np.uint8), "a", "f", ndim=1)
    assert found.dtype == np.int64 and found.tolist() == [3, 0]
    with pytest.raises(ValueError, match="f: expected a from 0 to 1000000000, found 1844674407370"):
        whole_numbers(np.array([2**64 - 1], np.uint64), "a", "f", ndim=1)


def test_values_are_shown_in_bounded_length():
    assert "..." in shown("x" * 1000) and len(shown("x" * 1000)) == 60
    nested = [0] * 10
    for _ in range(100):
        nested = [nested] * 10
    assert len(shown(nested)) <= 60
