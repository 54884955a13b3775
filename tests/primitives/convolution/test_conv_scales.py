"""Steps found from samples: their rules hold for the integers that follow."""

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.primitives.convolution.calibration import calibrate, least_error_step
from cmjax.primitives.convolution.packed import prepack
from cmjax.primitives.convolution.tiles import transform_filter_rounded
from cmjax.primitives.convolution.toom_cook import ALGORITHMS
from cmjax.primitives.convolution.winograd import winograd_conv1d


def _data(taps=3, cin=7, cout=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 90, cin)).astype(np.float32)
    return x, rng.normal(size=(taps, cin, cout)).astype(np.float32)


def _error(values, step, limit):
    return ((np.clip(np.round(values / step), -limit, limit) * step - values) ** 2).mean()


def test_the_step_of_least_error_is_no_worse_than_any_that_was_tried():
    values = np.random.default_rng(0).normal(size=(4, 1000)).astype(np.float32)
    step = np.asarray(least_error_step(jnp.asarray(values), (1,), 15))
    assert step.shape == (4, 1)
    top = np.abs(values).max(1)
    for row, chosen, most in zip(values, step[:, 0], top, strict=True):
        errors = [_error(row, f * most / 15, 15) for f in np.linspace(0.35, 1, 27)]
        assert _error(row, chosen, 15) <= min(errors) * (1 + 1e-4)
        assert min(errors) < 0.9 * errors[-1]  # covering the largest value is not the best


@pytest.mark.parametrize("algorithm", ["direct", "F(4,3)", "N44"])
def test_pairs_of_neighbouring_rows_stay_within_128_unless_told_otherwise(algorithm):
    x, w = _data(cin=9)

    def largest_pair(**options):
        scales = calibrate(x, w, algorithm=algorithm, **options)
        u = np.asarray(prepack(w, scales, packed=False).u, int)
        u = u.reshape(len(u), -1, 9, u.shape[-1])
        pairs = np.pad(u, ((0, 0), (0, 0), (0, 1), (0, 0))).reshape(*u.shape[:2], 5, 2, -1)
        return max(np.maximum(pairs, 0).sum(3).max(), np.maximum(-pairs, 0).sum(3).max())

    assert 100 < largest_pair() <= 128
    assert largest_pair(pair_rule=False) > 128


@pytest.mark.parametrize("domain", ["int8", "int16"])
def test_the_largest_magnitudes_become_the_largest_integers(domain):
    x, w = _data()
    largest = 127 if domain == "int8" else 2047
    scales = calibrate(x, w, algorithm="F(2,3)", domain=domain, method="max", pair_rule=False)
    u = np.asarray(prepack(w, scales, packed=False).u, int)
    np.testing.assert_array_equal(np.abs(u).max(1), largest)
    exact = np.asarray(transform_filter_rounded(jnp.asarray(w), "F(2,3)"))
    step = np.asarray(scales.filter_step)[:, None]
    assert np.abs(u * step - exact).max() <= 0.501 * step.max()


def test_shifts_are_powers_of_two_of_at_least_one():
    x, w = _data()
    options = {"algorithm": "F(4,3)-lavin", "input_limit": 127}
    free = calibrate(x, w, **options)
    shifts = np.log2(calibrate(x, w, requantize="shift", **options).point_step)
    np.testing.assert_array_equal(shifts, np.round(shifts))
    assert shifts.min() >= 0
    assert np.abs(shifts - np.log2(free.point_step)).max() < 1.5


def test_without_new_steps_the_default_range_is_the_largest_safe_one():
    x, w = _data()
    scales = calibrate(x, w, algorithm="F(4,3)-lavin", requantize="none")
    assert scales.input_limit == ALGORITHMS["F(4,3)-lavin"].safe_range() == 12
    np.testing.assert_array_equal(scales.point_step, 1)
    with pytest.raises(ValueError, match=r"F\(4,3\) enlarges inputs 169 times: none is safe"):
        calibrate(x, w, algorithm="F(4,3)", requantize="none")


def test_silence_has_usable_steps_and_gives_silence():
    x, w = np.zeros((1, 9, 7), np.float32), _data()[1]
    scales = calibrate(x, 0 * w, algorithm="F(2,3)")
    assert all(np.all(np.asarray(s) > 0) for s in (scales.input_step, scales.filter_step))
    np.testing.assert_array_equal(winograd_conv1d(x, w, scales=calibrate(x, w)), 0)


def test_int16_filters_shrink_where_many_channels_would_overflow():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1, 4, 1200)), rng.normal(size=(1, 1200, 2))
    x, w = x.astype(np.float32), w.astype(np.float32)
    scales = calibrate(x, w, domain="int16", algorithm="direct", method="max")
    u = np.asarray(prepack(w, scales, packed=False).u, int)
    assert np.abs(u).max() == (2**31 - 1) // (2047 * 1200) < 2047
