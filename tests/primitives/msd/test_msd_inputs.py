"""What `msd_dot` refuses, and what it says would do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.primitives.msd.product import MOST_INNER, msd_dot
from cmjax.primitives.msd.weight import quantize_weight

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 128)).astype(np.float32)
W = RNG.normal(size=(16, 128)).astype(np.float32)
BIAS = RNG.normal(size=16).astype(np.float32)
Q = quantize_weight(W)
M4 = quantize_weight(W, format="mxfp4")


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: msd_dot(X, Q.values), ValueError, "w_scale is needed"),
        (lambda: msd_dot(X, Q, w_scale=Q.scale), ValueError, "do not give them again"),
        (lambda: msd_dot(X.astype(int), Q), TypeError, "x must be float32, bfloat16, float16"),
        (lambda: msd_dot(X, W, w_scale=Q.scale), TypeError, r"w must be int8 \[features, inner\]"),
        (lambda: msd_dot(X, Q.values, w_scale=Q.scale, format="mxfp4"), TypeError, "be uint8"),
        (lambda: msd_dot(X, Q.values, w_scale=Q.scale, format="fp4"), ValueError, "format must be"),
        (lambda: msd_dot(X[:, :64], Q), ValueError, "is w stored"),
        (lambda: msd_dot(X, Q.values.T, w_scale=Q.scale), ValueError, "is w stored"),
        (lambda: msd_dot(np.float32(1), Q), ValueError, "x must end in the 128 inner elements"),
        (lambda: msd_dot(X, Q, passes=4), ValueError, "passes must be 1 to 3 for int8, got 4"),
        (lambda: msd_dot(X, M4, passes=3), ValueError, "passes must be 1 to 2 for mxfp4"),
        (lambda: msd_dot(X, Q, rounding="down"), ValueError, "rounding must be"),
        (lambda: msd_dot(X, Q.values, w_scale=Q.scale[:4]), ValueError, r"float32\[16\]"),
        (
            lambda: msd_dot(X, Q.values, w_scale=Q.scale, group_size=32),
            ValueError,
            r"w_scale must be float32\[16, 4\]",
        ),
        (
            lambda: msd_dot(X, Q.values, w_scale=Q.scale, group_size=48),
            ValueError,
            "multiple of group_size, got 48",
        ),
        (
            lambda: msd_dot(X, M4.values, w_scale=M4.scale, format="mxfp4", group_size=16),
            ValueError,
            "32 values, got group_size=16",
        ),
        (
            lambda: msd_dot(X, Q.values, w_scale=Q.scale, offset=BIAS[:3]),
            ValueError,
            r"offset must be float32\[16\]",
        ),
        (
            lambda: msd_dot(
                X, M4.values, w_scale=M4.scale, format="mxfp4", offset=np.zeros((16, 4), np.float32)
            ),
            ValueError,
            "mxfp4 weights have no offset",
        ),
        (lambda: msd_dot(X, Q, bias=BIAS[:3]), ValueError, r"bias must be \[16\], got \[3\]"),
        (lambda: msd_dot(X, Q, out_dtype=jnp.int8), TypeError, "out_dtype must be floating point"),
        (lambda: msd_dot(X * np.nan, Q), ValueError, "x holds infinities or NaN"),
        (
            lambda: msd_dot(X, Q.values, w_scale=-Q.scale),
            ValueError,
            "every w_scale must be positive and finite; 16 of 16",
        ),
        (
            lambda: msd_dot(X, M4.values, w_scale=M4.scale.at[0, 0].set(255), format="mxfp4"),
            ValueError,
            "the NaN of E8M0; 1 of 64",
        ),
        (
            lambda: jax.eval_shape(
                lambda x, w, s: msd_dot(x, w, w_scale=s),
                jnp.ones((1, MOST_INNER + 1), jnp.float32),
                jnp.ones((1, MOST_INNER + 1), jnp.int8),
                jnp.ones(1, jnp.float32),
            ),
            ValueError,
            "longest safe row is 132104",
        ),
    ],
)
def test_bad_inputs_are_refused_with_what_would_do(build, error, message):
    with pytest.raises(error, match=message):
        build()
