"""Straight-line programs compute their matrices, in few steps and exactly."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.primitives.convolution.straight_line import as_float32, largest_sum, straight_line
from cmjax.primitives.convolution.toom_cook import ALGORITHMS


def _exact(coefficient, value):
    return coefficient * value


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_program_computes_the_product_with_its_matrix(data):
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    entry = st.fractions(-4, 4, max_denominator=3)
    row = st.lists(entry, min_size=columns, max_size=columns).filter(any)
    matrix = data.draw(st.lists(row, min_size=rows, max_size=rows))
    values = [
        Fraction(v)
        for v in data.draw(st.lists(st.integers(-9, 9), min_size=columns, max_size=columns))
    ]
    got = straight_line(matrix).apply(values, _exact)
    assert got == [sum(c * v for c, v in zip(row, values, strict=True)) for row in matrix]


def test_rows_of_opposite_points_share_their_even_and_odd_parts():
    rows = [[0, 4, 4, -1, -1], [0, -4, 4, 1, -1]]  # +-(4 a - c) + (4 b - d)
    program = straight_line([[Fraction(c) for c in row] for row in rows])
    assert (program.additions, program.products) == (4, 2)  # instead of 6 and 4


@pytest.mark.parametrize("name", ALGORITHMS)
def test_input_transforms_stay_integers_within_the_rows_own_growth(name):
    form = ALGORITHMS[name]
    program = form.bt_program
    size = [Fraction(1)] * program.inputs  # an upper bound of every value for |inputs| <= 1
    for step in program.steps:
        assert step.ca.denominator == step.cb.denominator == 1
        size.append(
            abs(step.ca) * size[step.a] + (abs(step.cb) * size[step.b] if step.b >= 0 else 0)
        )
    assert max(size) <= form.growth


def test_a_program_is_the_same_whenever_it_is_made():
    at = ALGORITHMS["N88"].at
    assert straight_line(at) == straight_line(at) == ALGORITHMS["N88"].at_program


def test_values_may_be_float32_arrays_and_products_are_in_float32():
    program = straight_line([[Fraction(1, 3), Fraction(-1)], [Fraction(-2), Fraction(0)]])
    a, b = np.float32([0.1, 3.0]), np.float32([0.7, -2.0])
    first, second = program.apply([a, b])
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, as_float32(Fraction(1, 3)) * a - b)
    np.testing.assert_array_equal(second, -2 * a)


def test_growth_is_the_largest_row_sum_of_magnitudes():
    assert largest_sum([[Fraction(1), Fraction(-2)], [Fraction(1, 2), Fraction(0)]]) == 3


def test_bad_matrices_and_inputs_are_refused():
    with pytest.raises(ValueError, match="a row of the matrix is zero"):
        straight_line([[Fraction(0), Fraction(0)]])
    with pytest.raises(ValueError, match="2 values needed, got 1"):
        straight_line([[Fraction(1), Fraction(1)]]).apply([1.0])
