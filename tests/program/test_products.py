"""FLOP of complex, ragged and dilated products against counts of what is multiplied."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cmjax.program import trace

F32, BF16, C64 = jnp.float32, jnp.bfloat16, jnp.complex64


def array(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def totals(fn, *args, **sizes):
    return trace(fn, *args).totals(sizes)


def test_a_complex_product_is_four_real_ones():
    complex_ = totals(jnp.matmul, array(64, 128, dtype=C64), array(128, 32, dtype=C64))
    assert complex_["flops"] == complex_["cube_flops_32bit"] == 8 * 64 * 128 * 32
    assert complex_["read_bytes"] == 8 * (64 * 128 + 128 * 32)

    def by_hand(a, b, c, d):
        return a @ c - b @ d, a @ d + b @ c

    parts = [array(64, 128), array(64, 128), array(128, 32), array(128, 32)]
    assert complex_["cube_flops_32bit"] == totals(by_hand, *parts)["cube_flops_32bit"]


def product(a, b, c, d):
    return a * c - b * d, a * d + b * c


def sum_(a, b, c, d):
    return a + c, b + d


@pytest.mark.parametrize("complex_, real", [(jnp.multiply, product), (jnp.add, sum_)])
def test_complex_arithmetic_costs_its_real_operations(complex_, real):
    z, x = array(100, dtype=C64), array(100)
    ours, by_hand = totals(complex_, z, z), totals(real, x, x, x, x)
    assert ours["flops"] == by_hand["flops"]
    assert ours["vector_bytes"] == by_hand["vector_bytes"]


def test_a_complex_sum_and_a_convolution_count_both_parts():
    z = array(100, dtype=C64)
    assert totals(jnp.sum, z)["flops"] == 200
    x, w = array(1, 32, 4, dtype=C64), array(3, 4, 8, dtype=C64)

    def conv(x, w):
        return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    assert totals(conv, x, w)["flops"] == 4 * totals(conv, array(1, 32, 4), array(3, 4, 8))["flops"]


def multiplied(out, taps, stride, spread, dilation, before, channels):
    """Brute force along one axis: taps that fall on an element, or on padding, not between."""
    met = sum(
        (o * stride + k * dilation - before) % spread == 0
        for o, k in itertools.product(range(out), range(taps))
    )
    return 2.0 * met * channels


@pytest.mark.parametrize("stride, spread, dilation", [(1, 2, 1), (1, 3, 1), (2, 2, 1), (1, 2, 2)])
@pytest.mark.parametrize(
    "length, taps, padding", [(16, 3, (2, 2)), (17, 4, (3, 1)), (9, 5, (0, 0))]
)
def test_inserted_zeros_are_not_multiplied(length, taps, padding, stride, spread, dilation):
    def conv(x, w):
        return lax.conv_general_dilated(
            x, w, (stride,), [padding], (spread,), (dilation,), ("NWC", "WIO", "NWC")
        )

    args = array(2, length, 4), array(taps, 4, 8)
    out = jax.eval_shape(conv, *args).shape[1]
    want = multiplied(out, taps, stride, spread, dilation, padding[0], 2 * 4 * 8)
    assert totals(conv, *args)["flops"] == pytest.approx(want, rel=1e-12)


def test_a_transposed_convolution_costs_what_its_forward_convolution_costs():
    def up(x, w):
        return lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, w = array(1, 32, 32, 64), array(4, 4, 64, 64)
    inputs, taps = 32 * 32, 4 * 4
    assert totals(up, x, w)["flops"] == 2 * inputs * taps * 64 * 64
    # XLA leaves inserted zeros out as well, and the taps on the padding.
    xla = jax.jit(up).lower(x, w).compile().cost_analysis()["flops"]
    assert 0.9 < xla / totals(up, x, w)["flops"] <= 1


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_input_gradient_of_a_strided_convolution_costs_the_forward_pass(stride):
    def conv(x, w):
        return lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, w = array(1, 36, 36, 64), array(3, 3, 64, 64)
    y = jax.eval_shape(conv, x, w)
    forward = totals(conv, x, w)["flops"]

    def input_gradient(g, x, w):
        return jax.vjp(lambda x: conv(x, w), x)[1](g)

    def weight_gradient(g, x, w):
        return jax.vjp(lambda w: conv(x, w), w)[1](g)

    assert totals(input_gradient, y, x, w)["flops"] == pytest.approx(forward, rel=1e-12)
    assert totals(weight_gradient, y, x, w)["flops"] == pytest.approx(forward, rel=1e-12)


def test_a_symbolic_dilated_convolution_counts_its_share():
    (n,) = jax.export.symbolic_shape("n")

    def up(x, w):
        return lax.conv_general_dilated(x, w, (1,), [(1, 2)], (2,), (1,), ("NWC", "WIO", "NWC"))

    w = array(4, 4, 8)
    symbolic = totals(up, array(1, n, 4), w, n=100)
    assert symbolic["flops"] == pytest.approx(totals(up, array(1, 100, 4), w)["flops"], rel=1e-12)


GROUPS, ROWS, K, N = 8, 96, 32, 48
RAGGED = (array(ROWS, K), array(GROUPS, K, N), array(GROUPS, dtype=jnp.int32))


def test_a_ragged_product_multiplies_every_row_once():
    found = totals(lax.ragged_dot, *RAGGED)
    assert found["flops"] == found["cube_flops_32bit"] == 2 * ROWS * K * N
    assert found["read_bytes"] == 4 * (ROWS * K + GROUPS * K * N + GROUPS)
    assert found["write_bytes"] == 4 * ROWS * N
    # XLA on CPU masks rows for every group, and so multiplies each by every matrix.
    xla = jax.jit(lax.ragged_dot).lower(*RAGGED).compile().cost_analysis()["flops"]
    assert xla > 3 * found["flops"]


def test_both_gradients_of_a_ragged_product_cost_as_much_again():
    def gradients(x, w, sizes):
        return jax.grad(lambda x, w: jnp.sum(lax.ragged_dot(x, w, sizes) ** 2), (0, 1))(x, w)

    assert totals(gradients, *RAGGED)["cube_flops_32bit"] == 3 * 2 * ROWS * K * N


def test_a_ragged_product_of_symbolic_rows_is_the_dense_one_of_a_group():
    (rows,) = jax.export.symbolic_shape("rows")
    found = totals(lax.ragged_dot, array(rows, K, dtype=BF16), array(GROUPS, K, N, dtype=BF16),
                   array(GROUPS, dtype=jnp.int32), rows=1000)  # fmt: skip
    dense = totals(jnp.matmul, array(1000, K, dtype=BF16), array(K, N, dtype=BF16))
    assert found["cube_flops_16bit"] == dense["cube_flops_16bit"]
    assert found["read_bytes"] - dense["read_bytes"] == 2 * (GROUPS - 1) * K * N + 4 * GROUPS


def test_a_batched_ragged_product_has_its_batch():
    def layers(x, w, sizes):
        return jax.vmap(lax.ragged_dot)(x, w, sizes)

    args = array(5, ROWS, K), array(5, GROUPS, K, N), array(5, GROUPS, dtype=jnp.int32)
    assert totals(layers, *args)["flops"] == 5 * 2 * ROWS * K * N


def test_ragged_rows_of_values_run_as_counted():
    """The product that is counted is the one that runs: rows meet their own group's matrix."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(6, 3)), rng.normal(size=(2, 3, 4))
    got = lax.ragged_dot(jnp.asarray(x, F32), jnp.asarray(w, F32), jnp.array([2, 4]))
    want = np.concatenate([x[:2] @ w[0], x[2:] @ w[1]])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_product_with_scales_of_blocks_is_that_of_its_8_bit_values():
    values, scales = jnp.float8_e4m3fn, jnp.float8_e8m0fnu
    x, w = array(64, 128, dtype=values), array(128, 32, dtype=values)
    of_x, of_w = array(64, 4, dtype=scales), array(4, 32, dtype=scales)
    read = 64 * 128 + 128 * 32 + 64 * 4 + 4 * 32

    def scaled(x, w, a, b):
        return lax.scaled_dot(x, w, lhs_scale=a, rhs_scale=b, preferred_element_type=BF16)

    def transposed(x, w, a, b):  # as `scaled_matmul` takes them
        return jax.nn.scaled_matmul(x[None], w.T[None], a[None], b.T[None])

    plain = totals(lambda x, w: lax.dot(x, w, preferred_element_type=BF16), x, w)
    for fn in (scaled, transposed):
        found = totals(fn, x, w, of_x, of_w)
        assert found["flops"] == plain["flops"] == 2 * 64 * 128 * 32
        assert found["cube_flops_8bit"] == plain["cube_flops_8bit"] == found["flops"]
        assert found["read_bytes"] == read
