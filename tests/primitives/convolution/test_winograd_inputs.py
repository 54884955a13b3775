"""What `winograd_conv1d`, `prepack` and `calibrate` refuse, and what they say would do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.primitives.convolution import calibrate
from cmjax.primitives.convolution.packed import prepack
from cmjax.primitives.convolution.winograd import int8_conv1d, winograd_conv1d

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 20, 6)), jnp.float32)
W = jnp.asarray(RNG.normal(size=(3, 6, 5)), jnp.float32)
SCALES = calibrate(X, W, algorithm="F(2,3)", method="max")
PACKED = prepack(W, SCALES)


def _with(scales, **changes):
    return dataclasses.replace(scales, **changes)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: winograd_conv1d(X[0], W), ValueError, r"x must be \[batch, length, cin\], got"),
        (
            lambda: winograd_conv1d(X, W[0]),
            ValueError,
            r"w must be \[taps, cin, cout\], got \(6, 5\)",
        ),
        (lambda: winograd_conv1d(X, W[:, 1:]), ValueError, r"w must be \[taps, 6, cout\]"),
        (lambda: winograd_conv1d(X.astype(int), W), TypeError, "x must be floating point, got int"),
        (lambda: winograd_conv1d(X, W, algorithm="F(9,9)"), ValueError, "unknown algorithm .* N88"),
        (
            lambda: winograd_conv1d(X, W[:, :, :], algorithm="F(3,2)"),
            ValueError,
            r"F\(3,2\) serves 1 to 2 taps, got 3; for 3 taps there are F\(6,3\), F\(4,3\)",
        ),
        (
            lambda: winograd_conv1d(X, W, domain="int4"),
            ValueError,
            "domain must be one of .*'int16'",
        ),
        (
            lambda: winograd_conv1d(X, W, stride=-1),
            ValueError,
            "stride must be an integer of at least",
        ),
        (
            lambda: winograd_conv1d(X, W, dilation=2, algorithm="F(2,3)"),
            ValueError,
            "dilated filter is served by algorithm='direct'",
        ),
        (lambda: winograd_conv1d(X, W, padding="same"), ValueError, "padding must be one of"),
        (lambda: winograd_conv1d(X, W, activation="gelu"), ValueError, "None, 'relu' or a slope"),
        (
            lambda: winograd_conv1d(X, W, bias=jnp.ones(4)),
            ValueError,
            r"bias must be .* \[5\], got",
        ),
        (
            lambda: winograd_conv1d(X[:, :2], W, padding="VALID"),
            ValueError,
            "reaches over 3 frames",
        ),
        (
            lambda: winograd_conv1d(X, W, scales=SCALES, algorithm="F(4,3)"),
            ValueError,
            r"scales are of F\(2,3\) in int8, and F\(4,3\) in int8 was asked for",
        ),
        (
            lambda: winograd_conv1d(X, W, scales=_with(SCALES, input_step=jnp.zeros(()))),
            ValueError,
            "scales.input_step must be positive and finite; 1 of 1 is not",
        ),
        (
            lambda: winograd_conv1d(X, W, scales=_with(SCALES, point_step=jnp.ones(3))),
            ValueError,
            r"scales.point_step must have shape \(4,\)",
        ),
        (
            lambda: prepack(W, _with(SCALES, filter_step=SCALES.filter_step.at[1, 2].set(jnp.nan))),
            ValueError,
            "prepack: scales.filter_step must be positive and finite; 1 of 20 is not",
        ),
        (lambda: prepack(W[0], SCALES), ValueError, r"w must be \[taps, cin, cout\]"),
        (
            lambda: winograd_conv1d(X, PACKED, stride=2),
            ValueError,
            "packed with stride=1, and 2 was",
        ),
        (
            lambda: winograd_conv1d(X, PACKED, scales=SCALES),
            ValueError,
            "scales belong into prepack",
        ),
        (
            lambda: winograd_conv1d(X[..., 1:], PACKED),
            ValueError,
            r"x must be \[batch, length, 6\]",
        ),
        (lambda: winograd_conv1d(X, W, stride=0), ValueError, "stride must be an integer of at"),
        (lambda: winograd_conv1d(X, W, scales=3), TypeError, "scales must be ConvScales, .* got 3"),
        (lambda: prepack(W, 0.1), TypeError, "prepack: scales must be ConvScales"),
        (lambda: calibrate(X * jnp.nan, W), ValueError, "x must be finite, 240 of 240 are not"),
        (lambda: calibrate(X[:, :2], W, padding="VALID"), ValueError, "reaches over 3 frames"),
        (lambda: calibrate(X, W, domain="float32"), ValueError, "domain must be one of"),
        (lambda: calibrate(X, W, method="l1"), ValueError, "method must be one of"),
        (
            lambda: calibrate(X, W, min_sqnr_db=50),
            ValueError,
            "more than direct convolution of int8",
        ),
        (lambda: calibrate(X, W, input_limit=0), ValueError, r"input_limit must lie in 1\.\.32767"),
    ],
)
def test_bad_inputs_are_refused_with_what_would_do(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_too_many_channels_for_int32_are_refused_with_the_safe_number():
    x, w = jnp.zeros((1, 4, 50_000)), jnp.zeros((3, 50_000, 1))
    with pytest.raises(ValueError, match="tap blocks is 133144"):
        jax.eval_shape(lambda x, w: int8_conv1d(x, w), x, w)
