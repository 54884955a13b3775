"""Quantities as people write them, to SI."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.hardware.units import UNITS, parse_quantity

ANY_UNIT = st.sampled_from([(d, unit) for d, units in UNITS.items() for unit in units])


@given(st.floats(0, 1e12, allow_subnormal=False), ANY_UNIT)
def test_a_written_quantity_reads_back_as_number_times_unit(number, unit):
    dimension, name = unit
    want = number * UNITS[dimension][name]
    for text in (f"{number!r} {name}", f"{number!r}{name}", f"  {number!r}  {name} "):
        assert parse_quantity(text, dimension) == want


@pytest.mark.parametrize(
    "text, dimension, value",
    [
        ("1.6 TB/s", "bytes/s", 1.6e12),
        ("400 Gbps", "bytes/s", 50e9),  # bits
        ("64 GB", "bytes", 64e9),
        ("192 MiB", "bytes", 192 * 2**20),
        ("376 TFLOPS", "flop/s", 376e12),
        ("752 TOPS", "flop/s", 752e12),
        ("0.2 us", "s", 0.2e-6),
        ("0.2 µs", "s", 0.2e-6),
        ("84 %", "fraction", 0.84),
        ("1e3 ns", "s", 1e-6),
        (".5 s", "s", 0.5),
        ("5. s", "s", 5.0),
        ("+5 s", "s", 5.0),
        ("0 ms", "s", 0.0),
    ],
)
def test_quantities_mean_what_a_physicist_reads(text, dimension, value):
    assert parse_quantity(text, dimension) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    "text, dimension, message",
    [
        (1.6e12, "bytes/s", '1600000000000.0 has no unit; expected a string like "1.6 TB/s"'),
        (True, "s", 'True has no unit; expected a string like "1.2 us"'),
        (None, "bytes", 'None has no unit; expected a string like "64 GB"'),
        ("1.6", "bytes/s", "'1.6' has no unit; expected bytes/s, like \"1.6 TB/s\""),
        ("1.6 GB", "bytes/s", "'1.6 GB' has unit 'GB'; expected bytes/s, like \"1.6 TB/s\""),
        ("3 parsecs", "s", "'3 parsecs' has unit 'parsecs'; expected s, like \"1.2 us\""),
        ("1 gb", "bytes", "'1 gb' has unit 'gb'; expected bytes, like \"64 GB\""),
        ("1 TOPS", "fraction", "'1 TOPS' has unit 'TOPS'; expected fraction, like \"84 %\""),
        ("fast", "flop/s", "'fast' is not a number with a unit; expected one like \"376 TFLOPS\""),
        ("", "s", "'' is not a number with a unit; expected one like \"1.2 us\""),
        ("1.2.3 s", "s", "'1.2.3 s' is not a number with a unit; expected one like \"1.2 us\""),
        (". s", "s", "'. s' is not a number with a unit; expected one like \"1.2 us\""),
        ("1 2 s", "s", "'1 2 s' is not a number with a unit; expected one like \"1.2 us\""),
        ("nan s", "s", "'nan s' is not a number with a unit; expected one like \"1.2 us\""),
        ("-3 us", "s", "'-3 us' is negative"),
        ("1e400 s", "s", "'1e400 s' is not finite"),
    ],
)
def test_a_bad_quantity_says_what_was_expected(text, dimension, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_quantity(text, dimension)
