"""FLOP, transcendentals and bytes against XLA's own cost analysis of the compiled program.

XLA counts n - 1 FLOP for a sum of n, and a loop's body once; where the two differ for such a known
reason, the difference is written out.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import roofline

from cmjax.program import trace, trip_count

F32 = jnp.float32


def array(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def by_xla(fn, *args) -> dict[str, float]:
    found = jax.jit(fn).lower(*args).compile().cost_analysis()
    return {
        "flops": found.get("flops", 0.0),
        "transcendentals": found.get("transcendentals", 0.0),
        "bytes": found["bytes accessed"],
    }


def by_cmjax(fn, *args) -> dict[str, float]:
    totals = trace(fn, *args).totals({})
    return {
        "flops": totals["flops"],
        "transcendentals": totals["transcendentals"],
        "bytes": totals["read_bytes"] + totals["write_bytes"],
    }


def rms_norm_product(x, gain, w):
    return (x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain) @ w


EXACT = {
    "matrix product": (lambda x, w: x @ w, array(64, 128), array(128, 32)),
    "matrix-vector product": (lambda x, w: x @ w, array(64, 128), array(128)),
    "chain of batched products": (
        lambda x, y, z: (x @ y) @ z,
        array(4, 64, 128),
        array(4, 128, 32),
        array(4, 32, 16),
    ),
    "contraction over two axes": (
        lambda x, y: jnp.einsum("abij,ijc->abc", x, y),
        array(3, 5, 8, 16),
        array(8, 16, 32),
    ),
    "element-wise chain": (
        lambda x, y: jnp.exp(x * y + x) - jnp.tanh(y),
        array(64, 128),
        array(64, 128),
    ),
    "chain with a broadcast row": (lambda x, r: (x - r) * r, array(64, 128), array(128)),
    "convolution": (
        lambda x, w: lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        array(2, 16, 16, 8),
        array(3, 3, 8, 8),
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_flops_and_bytes_are_xlas_exactly(case):
    fn, *args = EXACT[case]
    assert by_cmjax(fn, *args) == by_xla(fn, *args)


@pytest.mark.parametrize("stride, dilation, groups", [(2, 1, 1), (1, 2, 1), (1, 1, 4), (2, 1, 8)])
def test_convolution_flops_are_xlas_with_strides_dilation_and_groups(stride, dilation, groups):
    def convolution(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            "VALID",
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    args = array(2, 16, 16, 8), array(3, 3, 8 // groups, 16)
    assert by_cmjax(convolution, *args)["flops"] == by_xla(convolution, *args)["flops"]


def test_softmax_is_xlas_up_to_one_flop_per_row_and_reduction():
    rows, reductions = 64, 2
    args = jax.nn.softmax, array(rows, 128)
    ours, xla = by_cmjax(*args), by_xla(*args)
    assert ours["flops"] - xla["flops"] == reductions * rows
    assert ours["transcendentals"] == xla["transcendentals"]
    assert ours["bytes"] == xla["bytes"]


def test_rms_norm_and_product_are_xlas_up_to_one_column():
    rows = 64
    args = rms_norm_product, array(rows, 128), array(128), array(128, 32)
    ours, xla = by_cmjax(*args), by_xla(*args)
    assert ours["flops"] - xla["flops"] == rows
    assert ours["transcendentals"] == xla["transcendentals"]
    # XLA may give the [rows, 1] column of 1 / rms a kernel of its own: one more write and read.
    assert 0 <= xla["bytes"] - ours["bytes"] <= 2 * rows * 4


def test_a_scan_is_its_body_times_its_length():
    length, n = 6, 64

    def layers(x, ws):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    args = layers, array(n, n), array(length, n, n)
    ours, xla = by_cmjax(*args), by_xla(*args)
    # XLA counts the body once, and the counter's comparison and increment.
    assert xla["flops"] - ours["flops"] / length == 2
    assert xla["transcendentals"] == ours["transcendentals"] / length
    # Per layer: the product reads x, w and writes y; tanh reads y and writes x.
    assert ours["bytes"] == length * 5 * n * n * 4


def test_a_scan_equals_the_unrolled_loop():
    def layer(x, w):
        return jnp.tanh(x @ w)

    def unrolled(x, ws):
        for i in range(6):
            x = layer(x, lax.index_in_dim(ws, i, keepdims=False))
        return x

    def scanned(x, ws):
        return lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0]

    args = array(64, 64), array(6, 64, 64)
    assert by_cmjax(scanned, *args) == by_cmjax(unrolled, *args)
    assert by_xla(unrolled, *args)["flops"] == by_cmjax(unrolled, *args)["flops"]


def test_a_gather_reads_only_its_rows_where_xla_counts_the_whole_table():
    def lookup(table, index):
        return table.at[index].get(mode="promise_in_bounds")

    table, rows, width = 1000, 10, 64
    args = lookup, array(table, width), array(rows, dtype=jnp.int32)
    ours, xla = by_cmjax(*args), by_xla(*args)
    assert ours["bytes"] == 2 * rows * width * 4 + rows * 4
    assert xla["bytes"] - ours["bytes"] >= (table - rows) * width * 4


@pytest.mark.parametrize("combine", ["set", "add"])
def test_a_scatter_touches_only_its_rows(combine):
    def write(table, index, rows):
        return getattr(table.at[index], combine)(rows, mode="promise_in_bounds")

    rows, width = 10, 64
    args = array(1000, width), array(rows, dtype=jnp.int32), array(rows, width)
    work = trace(write, *args).operations[-1].work  # before it, negative indices are wrapped
    moved = rows * width * 4
    assert work.write_bytes == moved
    assert work.read_bytes == moved * (2 if combine == "add" else 1) + rows * 4
    assert work.flops == (rows * width if combine == "add" else 0)


def mlp(params, x):
    return jnp.sum(jnp.tanh(x @ params[0]) @ params[1])


def test_a_training_step_has_three_times_the_forward_products():
    args = (array(64, 32), array(32, 16)), array(128, 64)
    forward = trace(mlp, *args).totals({})["cube_flops_32bit"]
    assert forward == 2 * 128 * (64 * 32 + 32 * 16)
    backward = trace(jax.value_and_grad(mlp, argnums=(0, 1)), *args).totals({})
    assert backward["cube_flops_32bit"] == 3 * forward


def test_the_gradient_of_an_mlp_is_xlas_up_to_the_derivative_of_tanh():
    rows, hidden = 128, 32
    args = jax.grad(mlp), (array(64, hidden), array(hidden, 16)), array(rows, 64)
    ours, xla = by_cmjax(*args), by_xla(*args)
    assert ours["transcendentals"] == xla["transcendentals"]
    # XLA expands 1 - t**2 to (1 - t)(1 + t), three FLOP an element against one.
    assert xla["flops"] - ours["flops"] == 2 * rows * hidden


def test_rematerialisation_is_charged():
    args = (array(64, 32), array(32, 16)), array(128, 64)
    plain = trace(jax.grad(mlp, argnums=(0, 1)), *args).totals({})
    saved = trace(jax.grad(jax.checkpoint(mlp), argnums=(0, 1)), *args).totals({})
    # The plain gradient needs not the second product's value; remat computes the first again.
    assert saved["transcendentals"] == 128 * 32
    assert saved["cube_flops_32bit"] == plain["cube_flops_32bit"]
    both = trace(jax.value_and_grad(jax.checkpoint(mlp), argnums=(0, 1)), *args).totals({})
    assert both["cube_flops_32bit"] - plain["cube_flops_32bit"] == 2 * 128 * (64 * 32 + 32 * 16)
    assert both["transcendentals"] == 2 * 128 * 32


def test_custom_derivatives_are_read_through():
    @jax.custom_vjp
    def square(x):
        return x * x

    square.defvjp(lambda x: (x * x, x), lambda x, g: (g * 2.0 * x,))

    @jax.custom_jvp
    def cube(x):
        return x * x * x

    cube.defjvp(lambda primals, tangents: (cube(*primals), 3 * primals[0] ** 2 * tangents[0]))
    x = array(1000)
    assert trace(square, x).totals({})["flops"] == 1000
    assert trace(cube, x).totals({})["flops"] == 2000
    value_and_slope = trace(jax.vmap(jax.value_and_grad(lambda x: square(cube(x)))), x)
    # x*x*x and its square; then 2 * g * c, and 3 * x**2 times that (four products).
    assert 3000 < value_and_slope.totals({})["flops"] <= 9000


def test_symbolic_sizes_agree_with_concrete_traces():
    def block(x, w, keys):
        q = jnp.tanh(x @ w)
        weights = jax.nn.softmax(jnp.einsum("btd,bkd->btk", q, keys))
        out = jnp.einsum("btk,bkd->btd", weights, keys)
        return jnp.concatenate([out, x], axis=-1).reshape(-1, 128) * 2.0

    b, n = jax.export.symbolic_shape("b, n")
    symbolic = trace(block, array(b, 8, 64), array(64, 64), array(b, n, 64))
    assert symbolic.symbols == {"b", "n"}
    for batch, keys in ((2, 32), (6, 4096), (128, 1000)):
        concrete = trace(block, array(batch, 8, 64), array(64, 64), array(batch, keys, 64))
        want = concrete.totals({})
        at = symbolic.at(b=float(batch), n=float(keys))
        assert at.symbols == set()
        for totals in (symbolic.totals({"b": batch, "n": keys}), at.totals({})):
            assert totals == pytest.approx(want, rel=1e-12)
        fixed = symbolic.at(b=float(batch))
        assert fixed.symbols == {"n"}
        assert fixed.totals({"n": keys}) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    "dtypes, field",
    [
        (("int8", "int8"), "cube_flops_8bit"),
        (("float8_e4m3fn", "float8_e4m3fn"), "cube_flops_8bit"),
        (("bfloat16", "bfloat16"), "cube_flops_16bit"),
        (("float16", "float16"), "cube_flops_16bit"),
        (("float32", "float32"), "cube_flops_32bit"),
        (("bfloat16", "int8"), "cube_flops_16bit"),
        (("int8", "bfloat16"), "cube_flops_16bit"),
    ],
)
def test_a_product_runs_at_the_rate_of_its_wider_operand(dtypes, field):
    x, w = (array(8, 16, dtype=jnp.dtype(d)) for d in dtypes)

    def product(x, w):
        return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=F32)

    totals = trace(product, x, w).totals({})
    charged = {k: v for k, v in totals.items() if k.startswith("cube") and v}
    assert charged == {field: 2 * 8 * 8 * 16}


def test_a_four_bit_weight_is_half_a_byte():
    totals = trace(lambda w: w.astype(jnp.int8), array(1000, dtype=jnp.int4)).totals({})
    assert (totals["read_bytes"], totals["write_bytes"]) == (500, 1000)


def test_a_sort_makes_more_than_one_pass_over_hbm_and_top_k_one():
    x = array(16, 4096)
    ordered = trace(jnp.sort, x).totals({})
    best = trace(lambda x: lax.top_k(x, 8)[0], x).totals({})
    nbytes = 16 * 4096 * 4
    assert ordered["read_bytes"] == ordered["write_bytes"] == np.log2(4096) / 4 * nbytes
    assert nbytes <= best["read_bytes"] < 1.1 * nbytes
    assert best["vector_bytes"] < ordered["vector_bytes"]


# What XLA's cost analysis and JAX's roofline get wrong, and a trace right.


def by_roofline(fn, *args) -> int:
    _, result = roofline.roofline(fn)(*args)
    return result.unfused_flops


LENGTH, WIDTH = 12, 64
MATRICES = array(WIDTH, WIDTH), array(LENGTH, WIDTH, WIDTH)
ONE_PRODUCT = 2 * WIDTH**3


def scanned(x, ws):
    return lax.scan(lambda x, w: (x @ w, None), x, ws)[0]


def unrolled(x, ws):
    for i in range(LENGTH):
        x = x @ lax.index_in_dim(ws, i, keepdims=False)
    return x


def test_a_scan_is_its_unrolled_loop_where_xla_counts_its_body_once():
    assert by_cmjax(scanned, *MATRICES)["flops"] == LENGTH * ONE_PRODUCT
    assert by_cmjax(scanned, *MATRICES) == by_cmjax(unrolled, *MATRICES)
    assert by_xla(unrolled, *MATRICES)["flops"] == LENGTH * ONE_PRODUCT
    assert by_xla(scanned, *MATRICES)["flops"] == pytest.approx(ONE_PRODUCT, rel=1e-4)


def test_a_scan_in_a_scan_is_the_product_of_their_lengths():
    def nested(x, ws):
        return lax.scan(lambda x, _: (scanned(x, ws), None), x, length=5)[0]

    assert by_cmjax(nested, *MATRICES)["flops"] == 5 * LENGTH * ONE_PRODUCT
    assert by_xla(nested, *MATRICES)["flops"] == pytest.approx(ONE_PRODUCT, rel=1e-3)


def branching(flag, x, w):
    return lax.cond(flag, lambda: x @ w, lambda: x)


def test_a_cond_is_its_costlier_branch_where_the_roofline_counts_nothing():
    args = array(dtype=jnp.bool_), array(WIDTH, WIDTH), array(WIDTH, WIDTH)
    assert by_cmjax(branching, *args)["flops"] == ONE_PRODUCT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert by_roofline(branching, *args) < ONE_PRODUCT


def test_a_loop_that_ends_by_itself_is_its_declared_trip_count():
    def newton(x, w):
        def step(state):
            i, y = state
            return i + 1, y @ w

        def unfinished(state):
            return (jnp.max(state[1]) < 10.0) & (state[0] < LENGTH)

        with trip_count(LENGTH):
            return lax.while_loop(unfinished, step, (0, x))[1]

    args = array(WIDTH, WIDTH), array(WIDTH, WIDTH)
    assert by_cmjax(newton, *args)["flops"] - LENGTH == LENGTH * ONE_PRODUCT  # and a counter
    assert by_xla(newton, *args)["flops"] < 2 * ONE_PRODUCT


def test_the_roofline_counts_a_loops_body_once_or_not_at_all():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert by_roofline(unrolled, *MATRICES) == LENGTH * ONE_PRODUCT
        assert by_roofline(scanned, *MATRICES) <= ONE_PRODUCT
    assert by_cmjax(scanned, *MATRICES)["flops"] == LENGTH * ONE_PRODUCT
