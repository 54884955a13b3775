"""The choice of an algorithm: fastest above a floor, direct where transforms do not pay."""

import pytest

from cmjax.primitives.convolution.choice import (
    BASE_SQNR_DB,
    FLOOR_DB,
    choose_algorithm,
    expected_sqnr_db,
    relative_time,
)
from cmjax.primitives.convolution.toom_cook import ALGORITHMS, supported


@pytest.mark.parametrize("domain", BASE_SQNR_DB)
@pytest.mark.parametrize("taps", [3, 5, 7, 32])
def test_no_algorithm_above_the_floor_is_faster(taps, domain):
    chosen = choose_algorithm(taps, 256, 256, domain=domain)
    time = relative_time(chosen, taps, 256, 256)
    assert time < 0.8
    assert expected_sqnr_db(chosen, taps, domain) >= FLOOR_DB[domain]
    for name in supported(taps):
        if relative_time(name, taps, 256, 256) < time:
            assert expected_sqnr_db(name, taps, domain) < FLOOR_DB[domain]


def test_the_choice_is_direct_where_transforms_do_not_pay():
    assert choose_algorithm(1, 256, 256, domain="int8") == "direct"
    assert choose_algorithm(3, 256, 256, domain="int8", dilation=2) == "direct"
    assert choose_algorithm(3, 2, 256, domain="int8") == "direct"
    assert choose_algorithm(7, 256, 256, domain="int8", outputs=1) == "direct"
    assert choose_algorithm(7, 256, 256, domain="int8", min_sqnr_db=37) == "direct"


def test_wider_operands_allow_larger_tiles():
    assert ALGORITHMS[choose_algorithm(7, 256, 256, domain="int16")].saving(7) > 2.6
    assert ALGORITHMS[choose_algorithm(7, 256, 256, domain="int8")].saving(7) < 2.2


def test_time_counts_whole_tiles_and_tends_to_the_saving_with_many_channels():
    assert relative_time("F(4,3)", 3, 64, 64, 5) > relative_time("F(4,3)", 3, 64, 64, 8)
    assert relative_time("F(4,3)", 3, 64, 64, 8) == relative_time("F(4,3)", 3, 64, 64)
    assert relative_time("F(4,3)", 3, 10**6, 10**6) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain": "int4"}, "domain must be one of int8, int16, float32, got 'int4'"),
        ({"min_sqnr_db": 39}, "min_sqnr_db=39 is more than direct convolution of int8 gives"),
        ({"outputs": 0}, "must be at least 1, got 3, 8, 8 and 0"),
    ],
)
def test_bad_inputs_are_refused_with_what_would_do(change, message):
    with pytest.raises(ValueError, match=message):
        choose_algorithm(3, 8, 8, **{"domain": "int8"} | change)
