"""Block-FP8 against its definition."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cmjax.models.moe.checkpoint.block_fp8 import dequantize, quantize, scale_shape


@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (3, 2), (8, 9)])
def test_every_block_has_its_scale_and_the_last_ones_may_be_short(shape):
    block = (4, 3)
    rng = np.random.default_rng(0)
    q = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, size=scale_shape(shape, block)).astype(np.float32)
    want = [
        [float(q[i, j]) * float(scale[i // 4, j // 3]) for j in range(shape[1])]
        for i in range(shape[0])
    ]
    got = dequantize(jnp.asarray(q), jnp.asarray(scale), block)
    np.testing.assert_allclose(got, want, rtol=1e-7)


def test_rounding_is_within_half_a_step_of_e4m3_and_the_largest_value_is_exact():
    w = np.random.default_rng(0).normal(size=(10, 13)).astype(np.float32)
    q, scale = quantize(jnp.asarray(w), (4, 4))
    back = np.asarray(dequantize(q, scale, (4, 4)))
    # three mantissa bits: half a step is 1/16 of the value, or of the smallest normal 2**-6
    bound = np.maximum(np.abs(w), 2**-6 * np.repeat(np.repeat(scale, 4, 0), 4, 1)[:10, :13]) / 16
    assert (np.abs(back - w) <= bound * (1 + 1e-6)).all()
    tops = np.abs(w[:4, :4]).max(), np.abs(back[:4, :4]).max()
    assert tops[0] == pytest.approx(tops[1], rel=1e-6)


def test_a_block_of_zeros_stays_zero():
    q, scale = quantize(jnp.zeros((3, 3)), (2, 2))
    assert not np.asarray(q, np.float32).any()
    assert (np.asarray(scale) == 1).all()
