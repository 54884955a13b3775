"""Windows, Fourier transforms, factorizations, selections and kernels written by hand."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax import lax
from jax.experimental import pallas as pl

from cmjax.program import UnpricedPrimitive, trace

F32, C64 = jnp.float32, jnp.complex64


def array(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def totals(fn, *args, **sizes):
    return trace(fn, *args).totals(sizes)


def by_xla(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()


def pooled(x, how=lax.max, start=-jnp.inf):
    return lax.reduce_window(x, start, how, (3, 3), (2, 2), "VALID")


@pytest.mark.parametrize("how, start", [(lax.max, -jnp.inf), (lax.min, jnp.inf), (lax.add, 0.0)])
def test_a_window_reduction_is_its_taps(how, start):
    x, outputs = array(65, 65), 32 * 32
    found = totals(lambda x: pooled(x, how, start), x)
    assert found["flops"] == 9 * outputs
    assert by_xla(lambda x: pooled(x, how, start), x)["flops"] == 8 * outputs  # n - 1 for n
    assert (found["read_bytes"], found["write_bytes"]) == (65 * 65 * 4, outputs * 4)


def test_the_gradient_of_a_maximum_pool_finds_the_maxima_again():
    found = totals(jax.grad(lambda x: jnp.sum(pooled(x))), array(65, 65))
    assert found["flops"] >= 10 * 32 * 32
    forward = totals(lambda x, t: jax.jvp(pooled, (x,), (t,)), array(65, 65), array(65, 65))
    assert forward["flops"] == 2 * 9 * 32 * 32


def test_reductions_by_a_function_of_ones_own_count_its_operations():
    def sum_of_doubles(x):
        return lax.reduce(x, jnp.float32(0), lambda a, b: a + 2 * b, (0,))

    assert totals(sum_of_doubles, array(64, 32))["flops"] == 2 * 64 * 32

    def windows(x):
        return lax.reduce_window(x, jnp.float32(0), lambda a, b: a + 2 * b, (4,), (4,), "VALID")

    assert totals(windows, array(64))["flops"] == 2 * 64


@pytest.mark.parametrize("n", [64, 4096])
def test_a_fourier_transform_is_five_n_log_n(n):
    found = totals(jnp.fft.fft, array(8, n, dtype=C64))
    assert found["flops"] == 5 * 8 * n * math.log2(n)
    assert found["read_bytes"] == found["write_bytes"] == 8 * n * 8
    assert totals(jnp.fft.rfft, array(8, n))["flops"] == found["flops"] / 2
    assert totals(jnp.fft.irfft, array(8, n // 2 + 1, dtype=C64))["flops"] == found["flops"] / 2


def test_a_fourier_transform_in_two_dimensions_passes_hbm_twice():
    found = totals(jnp.fft.fft2, array(64, 32, dtype=C64))
    assert found["flops"] == 5 * 64 * 32 * math.log2(64 * 32)
    assert found["read_bytes"] == 2 * 64 * 32 * 8


def test_logarithms_of_symbolic_sizes_are_exact():
    (n,) = jax.export.symbolic_shape("n")
    assert totals(jnp.fft.fft, array(n, dtype=C64), n=1000)["flops"] == pytest.approx(
        5 * 1000 * math.log2(1000), rel=1e-12
    )
    symbolic, fixed = totals(jnp.sort, array(n), n=5000), totals(jnp.sort, array(5000))
    assert symbolic == pytest.approx(fixed, rel=1e-12)
    assert fixed["flops"] == pytest.approx(5000 * math.log2(5000))


def counted_cholesky(n):
    """Multiply-adds, divisions and roots of the textbook's loops, one by one."""
    count = 0
    for j in range(n):
        count += 2 * j + 1  # the diagonal: j squares subtracted, a root
        count += (n - j - 1) * (2 * j + 1)  # below it: products subtracted, a division
    return count


def counted_lu(n):
    return sum((n - k - 1) + 2 * (n - k - 1) ** 2 for k in range(n))


N = 96


@pytest.mark.parametrize(
    "fn, count",
    [(lax.linalg.cholesky, counted_cholesky(N)), (lax.linalg.lu, counted_lu(N))],
    ids=["cholesky", "lu"],
)
def test_a_factorization_is_the_count_of_its_loops_to_leading_order(fn, count):
    found = totals(fn, array(N, N))["cube_flops_32bit"]
    assert found == pytest.approx(count, rel=3 / N)
    assert totals(fn, array(7, N, N))["cube_flops_32bit"] == 7 * found


CLOSED_FORMS = {
    "triangular_solve": (
        lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True),
        (array(N, N), array(N, 5)),
        N * N * 5,
    ),
    "triangular_solve from the right": (
        lambda a, b: lax.linalg.triangular_solve(a, b, left_side=False),
        (array(N, N), array(5, N)),
        N * N * 5,
    ),
    "qr": (jnp.linalg.qr, (array(2 * N, N),), 4 * N * N * (2 * N - N / 3)),
    "qr, wide": (jnp.linalg.qr, (array(N, 2 * N),), 4 * N * N * (2 * N - N / 3)),
    "qr, complete": (
        lambda x: jnp.linalg.qr(x, mode="complete"),
        (array(2 * N, N),),
        2 * N * N * (2 * N - N / 3) + 4 * (4 * N**3 - 2 * N**3 + N**3 / 3),
    ),
    "eigh": (
        lambda x: lax.linalg.eigh(x, symmetrize_input=False),
        (array(N, N),),
        9 * N**3,
    ),
    "svd": (
        lambda x: jnp.linalg.svd(x, full_matrices=False),
        (array(2 * N, N),),
        14 * 2 * N**3 + 8 * N**3,
    ),
    "svd, values only": (
        lambda x: jnp.linalg.svd(x, compute_uv=False),
        (array(N, 2 * N),),
        4 * 2 * N**3 - 4 / 3 * N**3,
    ),
    "eig": (jnp.linalg.eigvals, (array(N, N),), 10 * N**3),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_linear_algebra_is_the_textbooks_count(name):
    fn, args, want = CLOSED_FORMS[name]
    assert totals(fn, *args)["flops"] == pytest.approx(want, rel=1e-12)


def test_a_complex_factorization_is_four_real_ones():
    def factor(x):
        return lax.linalg.cholesky(x, symmetrize_input=False)

    assert totals(factor, array(N, N, dtype=C64))["cube_flops_32bit"] == 4 * N**3 / 3


def test_a_linear_solve_is_its_factorization_and_two_triangles():
    found = totals(jnp.linalg.solve, array(N, N), array(N, 3))
    want = 2 / 3 * N**3 + 2 * N * N * 3
    assert found["cube_flops_32bit"] == pytest.approx(want, rel=1e-12)
    symmetric = totals(
        lambda a, b: jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(a), b),
        array(N, N),
        array(N, 3),
    )
    want = N**3 / 3 + 2 * N * N * 3
    assert symmetric["cube_flops_32bit"] == pytest.approx(want, rel=1e-12)


def test_the_loops_that_are_counted_factorize():
    """The oracle's loops are the algorithm: they give SciPy's factors."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(6, 6))
    a = a @ a.T + 6 * np.eye(6)
    factor = np.zeros_like(a)
    for j in range(6):
        factor[j, j] = math.sqrt(a[j, j] - factor[j, :j] @ factor[j, :j])
        for i in range(j + 1, 6):
            factor[i, j] = (a[i, j] - factor[i, :j] @ factor[j, :j]) / factor[j, j]
    np.testing.assert_allclose(factor, scipy.linalg.cholesky(a, lower=True), rtol=1e-10)


@pytest.mark.parametrize("find", [lax.approx_max_k, lax.approx_min_k, lax.top_k])
def test_selections_read_their_rows_once(find):
    found = totals(lambda x: find(x, 8), array(64, 4096))
    assert found["read_bytes"] == 64 * 4096 * 4
    assert found["write_bytes"] == 64 * 8 * (4 + 4)


def element_wise(x, out):
    out[...] = x[...] * 2


def multiplying(x, w, out):
    out[...] = jnp.dot(x[...], w[...])


def kernel(body, shape, *args, **options):
    return pl.pallas_call(body, out_shape=array(*shape), **options)(*args)


def test_a_pallas_kernel_costs_what_it_declares():
    estimate = pl.CostEstimate(flops=1000, transcendentals=10, bytes_accessed=4096)
    found = totals(lambda x: kernel(element_wise, (128,), x, cost_estimate=estimate), array(128))
    assert (found["flops"], found["transcendentals"]) == (1000, 10)
    assert (found["read_bytes"], found["write_bytes"]) == (4096 - 512, 512)
    assert found["vector_bytes"] == 4 * (1000 + 4 * 10) and found["launches"] == 1


def test_a_pallas_kernel_that_multiplies_matrices_runs_on_the_cube_cores():
    flops = 2 * 128 * 128 * 128
    estimate = pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=3 * 128 * 128 * 4)
    x = array(128, 128)
    found = totals(lambda x, w: kernel(multiplying, (128, 128), x, w, cost_estimate=estimate), x, x)
    assert found["cube_flops_32bit"] == flops and found["vector_bytes"] == 0
    assert found["read_bytes"] == 2 * 128 * 128 * 4


def test_a_pallas_kernel_without_an_estimate_says_what_to_do():
    message = (
        "Pallas kernel 'double' has no cost estimate: call it as pl.pallas_call(..., "
        "cost_estimate=pl.CostEstimate(flops=..., transcendentals=..., bytes_accessed=...))"
    )
    with pytest.raises(UnpricedPrimitive, match=f"^{re.escape(message)}"):
        trace(lambda x: kernel(element_wise, (128,), x, name="double"), array(128))


def test_a_polynomial_is_a_product_and_a_sum_for_each_coefficient_but_the_first():
    fn = lambda x: jnp.polyval(jnp.arange(5.0), x)  # noqa: E731
    found = totals(fn, array(64, 32))
    assert found["flops"] == by_xla(fn, array(64, 32))["flops"] == 8 * 64 * 32
    assert (found["read_bytes"], found["write_bytes"]) == (64 * 32 * 4, 64 * 32 * 4)


def test_operations_above_xlas_level_are_what_jax_makes_of_them():
    """From JAX 0.12 on, `jnp.unique` and others are operations of their own in a jaxpr."""
    fn = lambda x: jnp.unique(x, size=8)  # noqa: E731
    names = {op.name for op in trace(fn, array(64)).operations}
    assert any("sort" in name for name in names), names


def test_a_number_of_groups_that_must_be_known_is_taken_from_the_sizes():
    groups, rows = jax.export.symbolic_shape("e, n")
    shapes = array(rows, 16), array(groups, 16, 32), array(groups, dtype=jnp.int32)
    program = trace(lax.ragged_dot, *shapes, at={"e": 4, "n": 64})
    assert program.totals({"e": 4, "n": 64})["flops"] == 2 * 64 * 16 * 32
    with pytest.raises(ValueError, match="the program needs its sizes as numbers: ragged_dot"):
        trace(lax.ragged_dot, *shapes)
