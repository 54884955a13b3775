"""Products of rows with the matrix of their group, against NumPy in float64 and `msd_dot`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, PartitionSpec

from cmjax.mesh import prepare_devices
from cmjax.primitives.grouped import grouped_dot, grouped_msd_dot, stacked_dot
from cmjax.primitives.msd import msd_dot, quantize_weight
from cmjax.program import trace

SIZES = {
    "one row each": [1, 1, 1, 1],
    "idle groups": [0, 5, 0, 2],
    "many rows": [30, 0, 41, 7],
    "rows behind the last": [2, 0, 1, 0],
    "no rows": [0, 0, 0, 0],
}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def _operands(rng, sizes, inner, features, dtype, rows=None):
    rows = sum(sizes) + 3 if rows is None else rows
    if dtype == "int8":
        x = rng.integers(-127, 128, (rows, inner))
        w = rng.integers(-128, 128, (len(sizes), inner, features))
    else:
        x, w = rng.normal(size=(rows, inner)), rng.normal(size=(len(sizes), inner, features))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(sizes, jnp.int32)


def _wanted(x, w, sizes):
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    group = np.repeat(np.arange(len(sizes)), np.asarray(sizes))
    y = np.zeros((x.shape[0], w.shape[2]))
    for row, g in enumerate(group):
        y[row] = x[row] @ w[g]
    return y


def _bound(dtype, inner):
    """Relative to sum |x| |w|: one float32 rounding a term, and bfloat16's of the result."""
    return inner * 2.0**-24 + (2.0**-8 if dtype == "bfloat16" else 0)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("inner, features", [(32, 64), (37, 50), (130, 300), (3, 1)])
def test_rows_meet_the_matrix_of_their_group(rng, sizes, dtype, inner, features):
    x, w, sizes = _operands(rng, sizes, inner, features, dtype)
    got = np.asarray(jax.jit(grouped_dot)(x, w, sizes), np.float64)
    wanted = _wanted(x, w, sizes)
    if dtype == "int8":
        np.testing.assert_array_equal(got, wanted)
    else:
        size = _wanted(jnp.abs(x), jnp.abs(w), sizes)
        assert (np.abs(got - wanted) <= _bound(dtype, inner) * size + 1e-30).all()


@pytest.mark.parametrize("format", ["int8", "mxfp4"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_few_bit_groups_are_msd_products_bit_by_bit(rng, format, sizes):
    x, _, sizes = _operands(rng, sizes, 96, 40, "float32")
    w = quantize_weight(jnp.asarray(rng.normal(size=(4, 40, 96)), jnp.float32), format=format)
    got = jax.jit(grouped_msd_dot)(x, w, sizes)
    group = np.repeat(np.arange(4), np.asarray(sizes))
    for row, g in enumerate(group):
        one = jax.tree.map(lambda a, g=g: a[g], w)
        wanted = msd_dot(x[row : row + 1], one)[0]
        # sums over MXFP4 blocks round, in an order that is the machine's
        np.testing.assert_allclose(got[row], wanted, rtol=0, atol=1e-5 if format == "mxfp4" else 0)
    assert not np.asarray(got[len(group) :]).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 2, 5, 13, 40])
def test_a_stack_is_multiplied_and_rows_of_zeros_give_zeros(rng, dtype, rows):
    x, w, _ = _operands(rng, [rows] * 3, 70, 200, dtype, rows=3 * rows)
    x = x.reshape(3, rows, 70).at[1].set(0).at[2, rows // 2].set(0)
    whole = functools.partial(stacked_dot, skip_zeros=False)
    found = [np.asarray(jax.jit(fn)(x, w), np.float64) for fn in (stacked_dot, whole)]
    wanted = np.einsum("srk,skn->srn", np.asarray(x, np.float64), np.asarray(w, np.float64))
    size = np.einsum("srk,skn->srn", *(np.abs(np.asarray(a, np.float64)) for a in (x, w)))
    for got in found:
        assert (np.abs(got - wanted) <= _bound(dtype, 70) * size).all()
    one = np.asarray(stacked_dot(x[0], w[0]), np.float64)
    assert (np.abs(one - wanted[0]) <= _bound(dtype, 70) * size[0]).all()


def test_gradients_are_those_of_the_formula(rng):
    x, w, sizes = _operands(rng, [3, 0, 4, 2], 5, 6, "float32", rows=11)
    ct = jnp.asarray(rng.normal(size=(11, 6)), jnp.float32)
    dx, dw = jax.grad(lambda x, w: jnp.sum(ct * grouped_dot(x, w, sizes)), (0, 1))(x, w)
    group = np.repeat(np.arange(4), np.asarray(sizes))
    for g in range(4):
        here = np.flatnonzero(group == g)
        np.testing.assert_allclose(dx[here], ct[here] @ w[g].T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dw[g], x[here].T @ ct[here], rtol=1e-5, atol=1e-5)
    assert not np.asarray(dx[9:]).any()


def test_the_gradient_of_few_bit_products_is_straight_through(rng):
    x, _, sizes = _operands(rng, [3, 0, 4], 32, 6, "float32", rows=7)
    w = quantize_weight(jnp.asarray(rng.normal(size=(3, 6, 32)), jnp.float32))
    dx = jax.grad(lambda x: jnp.sum(grouped_msd_dot(x, w, sizes)))(x)
    exact = np.asarray(w.values, np.float64) * np.asarray(w.scale, np.float64)[..., None]
    wanted = np.repeat(exact.sum(1), np.asarray(sizes), axis=0)
    np.testing.assert_allclose(dx, wanted, rtol=1e-4, atol=1e-4)


def test_batches_of_groups_and_of_rows(rng):
    x, w, _ = _operands(rng, [1, 2, 3], 16, 8, "float32", rows=18)
    x, sizes = x.reshape(3, 6, 16), jnp.array([[1, 2, 3], [6, 0, 0], [0, 0, 4]])
    got = jax.jit(jax.vmap(grouped_dot, in_axes=(0, None, 0)))(x, w, sizes)
    for i in range(3):
        np.testing.assert_allclose(got[i], _wanted(x[i], w, sizes[i]), rtol=1e-5, atol=1e-5)
    rows = jax.vmap(stacked_dot, in_axes=(1, None), out_axes=1)(x, w[0])
    np.testing.assert_allclose(rows, x @ w[0], rtol=1e-5, atol=1e-5)
    matrices = jax.vmap(stacked_dot, in_axes=(None, 0))(x[0], w)
    np.testing.assert_allclose(matrices, jnp.einsum("rk,skn->srn", x[0], w), rtol=1e-5, atol=1e-5)


def test_groups_split_over_devices_give_the_same(rng):
    prepare_devices(4)
    x, w, sizes = _operands(rng, [3, 1, 4, 2], 16, 8, "float32", rows=10)
    mesh = jax.make_mesh((4,), ("n",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:4])
    columns = PartitionSpec(None, None, "n")
    lifted = jax.shard_map(
        grouped_dot,
        mesh=mesh,
        in_specs=(PartitionSpec(), columns, PartitionSpec()),
        out_specs=PartitionSpec(None, "n"),
    )
    got = jax.jit(lifted)(x, w, sizes)
    np.testing.assert_allclose(got, _wanted(x, w, sizes), rtol=1e-5, atol=1e-5)


def test_an_exported_program_runs_without_the_kernels(rng):
    x, w, sizes = _operands(rng, [3, 0, 4], 16, 8, "float32", rows=7)
    fn = jax.jit(lambda x, w, s: (grouped_dot(x, w, s), stacked_dot(x, w[0])))
    exported = export.export(fn)(x, w, sizes)
    assert "custom_call @cmjax" not in exported.mlir_module()
    got = export.deserialize(exported.serialize()).call(x, w, sizes)
    np.testing.assert_allclose(got[0], _wanted(x, w, sizes), rtol=1e-5, atol=1e-5)


def test_a_stack_costs_what_dot_general_costs(rng):
    x, w, _ = _operands(rng, [4] * 3, 16, 8, "bfloat16", rows=12)
    x = x.reshape(3, 4, 16)
    plain = trace(lambda x, w: jax.lax.dot_general(x, w, (((2,), (1,)), ((0,), (0,)))), x, w)
    own = trace(stacked_dot, x, w)
    of_experts = {"stack_bytes": 3 * 16 * 8 * 2, "stack_row_bytes": 3 * 16 * 8 * 2 * 4}
    assert own.totals({}) == plain.totals({}) | of_experts
    of_heads = trace(lambda x, w: stacked_dot(x, w, skip_zeros=False), x, w)  # all have rows
    assert of_heads.totals({}) == plain.totals({})


@pytest.mark.parametrize(
    "rows, matrices, sizes, message",
    [
        ((4, 8), (2, 8, 3), [2, -1], "sizes must not be negative, 1 of 2 are"),
        ((4, 8), (2, 8, 3), [2, 3], "more than the 4 rows of x"),
        ((4, 8), (2, 8, 3), [2, 1, 1], "one entry for each of the 2 matrices"),
        ((4, 9), (2, 8, 3), [2, 2], "as the matrices have 8 inner elements"),
        ((4, 8), (8, 3), [2, 2], r"w must be \[groups, k, n\]"),
    ],
)
def test_groups_that_cannot_be_are_refused(rows, matrices, sizes, message):
    with pytest.raises(ValueError, match=message):
        grouped_dot(jnp.zeros(rows), jnp.zeros(matrices), jnp.array(sizes))


def test_dtypes_that_do_not_fit_are_refused():
    x, w = jnp.zeros((2, 4), jnp.float32), jnp.zeros((1, 4, 3), jnp.float32)
    with pytest.raises(TypeError, match="of one floating-point dtype, or both int8"):
        grouped_dot(x, w.astype(jnp.int8), jnp.array([2]))
    with pytest.raises(TypeError, match="of one floating-point dtype, or both int8"):
        stacked_dot(x.astype(jnp.int32), w[0].astype(jnp.int32))
    with pytest.raises(ValueError, match="start with the stack"):
        stacked_dot(jnp.zeros((2, 2, 4), jnp.float32), w)
    grouped = quantize_weight(jnp.ones((1, 3, 4), jnp.float32), group_size=2)
    with pytest.raises(ValueError, match="one scale per feature and no offset"):
        grouped_msd_dot(x, grouped, jnp.array([2]))
