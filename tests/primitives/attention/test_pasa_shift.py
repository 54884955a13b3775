"""The constants of PASA against the authors' iteration, exact entries and the mean they recover."""

import numpy as np
import pytest

from cmjax.primitives.attention.pasa_shift import pasa_beta, recovery_gain, shift_matrix

STARTS = (1 - 2**-4, 1 - 2**-5, 1 - 2**-6)


def _authors_beta(n, dtype, beta):
    """Their update, as their script writes it: beta / (1 - beta) = f, with entries in `dtype`."""
    for _ in range(100):
        b = float(np.asarray(beta / n).astype(dtype))
        a = float(np.asarray(1 - beta / n).astype(dtype)) + b
        f = b * n / (a * (a - b * n)) + (1 - a) / a
        beta, before = f / (1 + f), beta
        if abs(beta - before) < 1e-8:
            return beta
    raise AssertionError("no fixed point")


@pytest.mark.parametrize(
    ("block_size", "betas"),
    [
        (32, (0.9375, 0.96875, 0.984375)),
        (64, (0.9375, 0.96875, 0.984619140625)),
        (128, (0.9375, 0.968994140625, 0.9844970703125)),
        (256, (0.937744140625, 0.9688720703125, 0.98443603515625)),
        (512, (0.9376220703125, 0.96881103515625, 0.984405517578125)),
    ],
)
def test_beta_equals_the_authors_iteration_bit_for_bit(block_size, betas):
    for start, beta in zip(STARTS, betas, strict=True):
        assert pasa_beta(block_size, start=start) == beta
        assert abs(_authors_beta(block_size, np.float16, start) - beta) < 1e-12


def test_bfloat16_has_its_own_betas():
    found = [pasa_beta(128, "bfloat16", start=start) for start in STARTS]
    assert found == [0.93798828125, 0.968994140625, 0.9844970703125]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("block_size", [1, 2, 7, 29, 100, 127, 128, 511, 1023])
def test_at_the_fixed_point_rows_of_the_rounded_matrix_sum_to_one_minus_beta(block_size, dtype):
    beta = pasa_beta(block_size, dtype)
    rows = shift_matrix(block_size, beta, 1.0, dtype).sum(axis=1)
    np.testing.assert_allclose(rows, 1 - beta, atol=2e-12)
    assert recovery_gain(block_size, beta, 1.0, dtype) == pytest.approx(beta / (1 - beta), rel=1e-9)


def test_the_default_matrix_is_exact_in_float16():
    matrix = shift_matrix(128, 0.9375, 1.0)
    np.testing.assert_array_equal(np.diag(matrix), 2033 / 2048)
    np.testing.assert_array_equal(matrix[0, 1:], -15 / 2048)
    assert recovery_gain(128, 0.9375, 1.0) == 15.0


@pytest.mark.parametrize(
    ("d", "gains"),
    [
        (64, (15.0, 31.25197, 63.50394)),
        (80, (15.0102, 31.2117, 61.9784)),
        (96, (15.0401, 30.7566, 63.6646)),
        (128, (14.9824, 31.2092, 64.4071)),
        (256, (15.0, 31.25197, 63.50394)),
        (576, (15.0627, 31.2500, 62.5039)),
    ],
)
def test_the_gain_accounts_for_rounding_with_the_scale_folded_in(d, gains):
    for start, gain in zip(STARTS, gains, strict=True):
        found = recovery_gain(128, pasa_beta(128, start=start), d**-0.5)
        assert found == pytest.approx(gain, abs=6e-5)


@pytest.mark.parametrize("d", [64, 80, 96, 128, 576])
def test_the_gain_recovers_the_mean_that_the_rounded_matrix_took(d):
    scale, keys = d**-0.5, np.full(128, 3.7)
    shifted = shift_matrix(128, 0.9375, scale) @ keys
    gain = recovery_gain(128, 0.9375, scale)
    np.testing.assert_allclose(shifted + gain * shifted.mean(), scale * keys, rtol=1e-12)
    nominal = shifted + 15 * shifted.mean()
    off = abs(nominal[0] / (scale * 3.7) - 1)
    assert (off < 1e-12) == (d == 64)  # beta / (1 - beta) itself is right for powers of four only


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pasa_beta(0), "pasa_beta: block_size must be at least 1, an integer; got 0"),
        (lambda: pasa_beta(12.5), "an integer; got 12.5"),
        (lambda: pasa_beta(128, "int8"), "dtype must be floating point, got int8"),
        (lambda: pasa_beta(128, start=1.0), r"pasa_beta: start must lie in \[0, 1\), got 1.0"),
        (lambda: recovery_gain(128, 0.99999, 1.0), "cannot be undone once rounded to float16"),
        (lambda: recovery_gain(128, 0.9375, 1e-8), "take a smaller beta or shift='mean'"),
    ],
)
def test_bad_inputs_are_refused_with_what_would_do(build, message):
    with pytest.raises(ValueError, match=message):
        build()
