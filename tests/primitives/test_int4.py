"""W4A8 products against NumPy in float64 and exact integers."""

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.primitives.int4 import (
    GROUP,
    Int4Weight,
    grouped_int4_dot,
    int4_dot,
    pack_int4,
    quantize_int4,
    unpack_int4,
)
from cmjax.program import trace


def _matrix(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _rows(*shape, seed=1):
    return np.random.default_rng(seed).integers(-127, 128, shape).astype(np.int8)


def _float64(weight):
    steps = np.asarray(unpack_int4(weight.packed), np.float64)
    *stack, inner, outputs = steps.shape
    groups = weight.scale.shape[-2]
    each = steps.reshape(*stack, groups, inner // groups, outputs)
    return (each * np.asarray(weight.scale, np.float64)[..., None, :]).reshape(steps.shape)


def test_packing_keeps_every_value():
    steps = np.arange(-8, 8, dtype=np.int8).reshape(8, 2)
    packed = pack_int4(jnp.asarray(steps))
    assert packed.shape == (4, 2) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack_int4(packed), steps)


@pytest.mark.parametrize("inner", [16, GROUP, 3 * GROUP])
def test_a_rounded_matrix_is_within_half_a_step(inner):
    w = _matrix(2, inner, 5)
    weight = quantize_int4(jnp.asarray(w))
    assert weight.packed.shape == (2, inner // 2, 5)
    assert weight.scale.shape == (2, max(1, inner // GROUP), 5)
    step = np.repeat(np.asarray(weight.scale), inner // weight.scale.shape[1], axis=1)
    assert (np.abs(_float64(weight) - w) <= 0.5 * step * (1 + 1e-5)).all()


@pytest.mark.parametrize("inner", [16, 2 * GROUP])
def test_products_are_those_of_float64(inner):
    weight = quantize_int4(jnp.asarray(_matrix(3, inner, 8)))
    x = _rows(3, 7, inner)
    want = np.einsum("srk,skn->srn", x.astype(np.float64), _float64(weight))
    got = int4_dot(jnp.asarray(x), weight)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_rows_sorted_by_their_matrix_meet_it_alone():
    weight = quantize_int4(jnp.asarray(_matrix(3, 2 * GROUP, 8)))
    x, sizes = _rows(6, 2 * GROUP), jnp.array([1, 0, 5], jnp.int32)
    w = _float64(weight)[np.repeat(np.arange(3), sizes)]
    want = np.einsum("rk,rkn->rn", x.astype(np.float64), w)
    got = grouped_int4_dot(jnp.asarray(x), weight, sizes)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_it_costs_a_product_of_eight_bits_and_reads_four():
    weight = quantize_int4(jnp.asarray(_matrix(2, GROUP, 8)))
    program = trace(int4_dot, jnp.asarray(_rows(2, 3, GROUP)), weight)
    found = program.totals({})
    assert found["cube_flops_8bit"] == 2 * (2 * 3 * GROUP * 8)
    assert found["stack_bytes"] == 2 * GROUP * 8 / 2
    assert found["stack_row_bytes"] == 3 * found["stack_bytes"]
    read = 2 * 3 * GROUP + 2 * GROUP * 8 / 2 + 2 * 8 * 4
    assert found["read_bytes"] == read


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: quantize_int4(jnp.zeros((GROUP + 2, 4))),
            ValueError,
            "inner dimension must be a multiple of 256, or even and below, got 258",
        ),
        (lambda: quantize_int4(jnp.zeros((3, 4))), ValueError, "even and below, got 3"),
        (
            lambda: int4_dot(jnp.zeros((2, 16), jnp.float32), quantize_int4(jnp.ones((16, 4)))),
            TypeError,
            "x must be int8 and the matrix packed in uint8, got float32",
        ),
        (
            lambda: int4_dot(jnp.zeros((2, 8), jnp.int8), quantize_int4(jnp.ones((16, 4)))),
            ValueError,
            r"x must be \[\*stack, rows, 16\] .* got \[2, 8\]",
        ),
        (
            lambda: int4_dot(
                jnp.zeros((2, 16), jnp.int8),
                Int4Weight(jnp.zeros((8, 4), jnp.uint8), jnp.ones((3, 4))),
            ),
            ValueError,
            r"groups that divide 16, got \[3, 4\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
