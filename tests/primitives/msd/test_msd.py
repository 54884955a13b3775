"""`msd_dot` against float64 NumPy, under every transformation, sharded, exported and priced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cmjax.primitives.msd.product import MOST_INNER, float_of_total, msd_dot
from cmjax.primitives.msd.weight import dequantize_weight, quantize_weight
from cmjax.program import trace

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 128)).astype(np.float32)
W = RNG.normal(size=(16, 128)).astype(np.float32)
BIAS = RNG.normal(size=16).astype(np.float32)
WEIGHTS = {
    "int8": quantize_weight(W),
    "int8 in groups": quantize_weight(W, group_size=32),
    "int8 with offset": quantize_weight(W + 1, symmetric=False),
    "int8 groups with offset": quantize_weight(W + 1, symmetric=False, group_size=64),
    "mxfp4": quantize_weight(W, format="mxfp4"),
}


def _exact(x, weight, bias=0.0):
    return np.asarray(x, np.float64) @ np.asarray(dequantize_weight(weight), np.float64).T + bias


def _bound(x, weight):
    """What the error of x may do to a result, and float32 arithmetic beside it."""
    dense = np.abs(np.asarray(dequantize_weight(weight), np.float64))
    if weight.format == "mxfp4":
        blocks = np.abs(x).reshape(len(x), -1, 32).max(-1)
        alpha = 2.0 ** np.ceil(np.log2(np.maximum(blocks, 1e-300)))
        error = np.repeat(alpha, 32, axis=1) / 64
    else:
        error = np.abs(x).max(-1, keepdims=True) / 64516 * 1.01 * np.ones_like(x)
    return error @ dense.T + 2e-6 * (np.abs(x) @ dense.T)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("bias", [None, BIAS])
def test_results_are_within_the_bound_of_the_exact_product(kind, bias):
    weight = WEIGHTS[kind]
    got = msd_dot(X, weight, bias=bias)
    error = np.abs(got - _exact(X, weight, 0 if bias is None else bias))
    assert (error <= _bound(X, weight)).all()
    assert error.max() > 0


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["int8", "int8 in groups", "int8 with offset", "mxfp4"]),
    seed=st.integers(0, 2**31),
    power=st.integers(-25, 30),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
)
def test_the_bound_holds_for_rows_of_any_size_and_spread(kind, seed, power, spread):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, 128)) * 10.0 ** (power + spread * rng.normal(size=(3, 128)))
    x = np.clip(x, -1e35, 1e35).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = 0
    weight = WEIGHTS[kind]
    error = np.abs(msd_dot(x, weight) - _exact(x, weight))
    assert (error <= _bound(x.astype(np.float64), weight) + 128 * 2.0**-100 * 4).all()


@pytest.mark.parametrize("passes, worst", [(1, 2e-2), (2, 1e-4), (3, 1e-6)])
def test_more_passes_are_more_accurate(passes, worst):
    x, w = RNG.normal(size=(2, 64, 1024)).astype(np.float32)
    weight = quantize_weight(w)
    exact = _exact(x, weight)
    error = np.linalg.norm(msd_dot(x, weight, passes=passes) - exact) / np.linalg.norm(exact)
    assert error < worst
    if passes == 2:  # the rival: weights dequantized to bfloat16
        dense = np.asarray(jnp.asarray(dequantize_weight(weight), jnp.bfloat16), np.float64)
        rival = np.linalg.norm(x.astype(np.float64) @ dense.T - exact) / np.linalg.norm(exact)
        assert error < rival / 10


def test_totals_are_rounded_once():
    most = 127 * 128 * MOST_INNER
    ends = np.array([-most, -(2**24) - 1, -1, 0, 1, 2**24 + 1, 65535, 65536, most])
    c1, c2 = (np.concatenate([ends, RNG.integers(-most, most, 20_000)]) for _ in range(2))
    c1[9:4009] >>= 12
    got = float_of_total(jnp.asarray(c1, jnp.int32), jnp.asarray(c2, jnp.int32))
    np.testing.assert_array_equal(got, (254 * c1 + c2).astype(np.float32))


def test_integer_sums_are_those_of_int64_at_the_longest_row():
    """All operands at their extremes: 132,104 products of 127 and -128 just fit int32."""
    x = np.ones((1, MOST_INNER), np.float32)
    w = np.full((2, MOST_INNER), -128, np.int8)
    w[1] = 127
    got = np.asarray(msd_dot(x, w, w_scale=np.ones(2, np.float32)), np.float64)
    np.testing.assert_allclose(got[0], [-128.0 * MOST_INNER, 127.0 * MOST_INNER], rtol=3e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_once_at_the_end(dtype):
    x = jnp.asarray(X, dtype)
    weight = WEIGHTS["int8"]
    got = msd_dot(x, weight, bias=jnp.asarray(BIAS))
    wide = msd_dot(x.astype(jnp.float32), weight, bias=BIAS)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, wide.astype(dtype))
    np.testing.assert_array_equal(msd_dot(x, weight, out_dtype=jnp.float32, bias=BIAS), wide)


TRANSFORMS = {
    "jit": jax.jit,
    "vmap": jax.vmap,
    "vmap of axis 1": lambda f: lambda x: jax.vmap(f, in_axes=1)(x.T),
    "jit of vmap": lambda f: jax.jit(jax.vmap(f)),
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, row: (c, f(row)), 0, x)[1],
}


@pytest.mark.parametrize("kind", ["int8", "int8 groups with offset", "mxfp4"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_values_are_the_same_under_every_transformation(kind, transform):
    weight = WEIGHTS[kind]
    want = msd_dot(X, weight, bias=BIAS)
    got = TRANSFORMS[transform](lambda x: msd_dot(x, weight, bias=BIAS))(X)
    # One more or one less product with a scale is rounded in another order.
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def _equations(jaxpr):
    return [e for e in jaxpr.eqns if e.primitive.name == "cm_msd_dot"]


def test_a_mapped_row_leaves_the_weights_unmapped_and_mapped_weights_make_a_stack():
    weight = WEIGHTS["int8"]
    rows = jax.make_jaxpr(jax.vmap(lambda x: msd_dot(x, weight)))(np.stack([X, X]))
    (equation,) = _equations(rows)
    assert [v.aval.shape for v in equation.invars] == [(2, 6, 128), (16, 128), (16,)]
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), weight)
    experts = np.stack([X, 2 * X])
    (equation,) = _equations(jax.make_jaxpr(jax.vmap(msd_dot))(experts, stack))
    assert [v.aval.shape for v in equation.invars] == [(2, 6, 128), (2, 16, 128), (2, 16)]
    got = jax.vmap(jax.vmap(msd_dot, in_axes=(0, None)))(experts, stack)
    np.testing.assert_array_equal(got[1], msd_dot(2 * X, weight))
    shared = jax.vmap(lambda w: msd_dot(X, w))(stack)
    np.testing.assert_array_equal(shared[0], msd_dot(X, weight))
    biased = jax.vmap(lambda b: msd_dot(X, weight, bias=b))(np.stack([BIAS, 0 * BIAS]))
    np.testing.assert_array_equal(biased[0], msd_dot(X, weight, bias=BIAS))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_gradients_are_those_of_the_exact_product(kind):
    """Straight through the rounding: y = x W.T + b, W = scale (q + offset), in float64 NumPy."""
    weight = WEIGHTS[kind]
    dy = RNG.normal(size=(6, 16)).astype(np.float32)

    def loss(x, scale, offset, bias):
        y = msd_dot(
            x,
            weight.values,
            w_scale=scale,
            offset=offset,
            bias=bias,
            format=weight.format,
            group_size=weight.group_size,
        )
        return jnp.vdot(y, dy)

    moving = (0, 3) if kind == "mxfp4" else (0, 1, 3) if weight.offset is None else (0, 1, 2, 3)
    got = jax.jit(jax.grad(loss, moving))(X, weight.scale, weight.offset, BIAS)
    dense = np.asarray(dequantize_weight(weight), np.float64)
    np.testing.assert_allclose(got[0], dy @ dense, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[-1], dy.sum(0), rtol=1e-5)
    if kind == "mxfp4":
        return
    groups = weight.scale.reshape(16, -1).shape[1]
    outer = (dy.T.astype(np.float64) @ X).reshape(16, groups, -1)  # dL / dW
    scale = np.asarray(weight.scale, np.float64).reshape(16, groups)
    steps = dense.reshape(16, groups, -1) / scale[..., None]
    np.testing.assert_allclose(
        np.reshape(got[1], (16, groups)), (outer * steps).sum(-1), rtol=1e-4, atol=1e-2
    )
    if weight.offset is not None:
        want = outer.sum(-1) * scale
        np.testing.assert_allclose(np.reshape(got[2], want.shape), want, rtol=1e-3, atol=1e-4)


def test_forward_and_reverse_agree_and_compose_with_vmap():
    weight = WEIGHTS["int8"]
    dx, dy = RNG.normal(size=X.shape).astype(np.float32), RNG.normal(size=(6, 16))

    def fn(x):
        return msd_dot(x, weight)

    _, tangent = jax.jvp(fn, (X,), (dx,))
    _, pull = jax.vjp(fn, X)
    np.testing.assert_allclose(
        np.vdot(dy, tangent), np.vdot(pull(jnp.asarray(dy, jnp.float32))[0], dx), rtol=1e-4
    )
    rows = jax.jit(jax.vmap(jax.grad(lambda x: (fn(x) ** 2).sum())))(X)
    whole = jax.grad(lambda x: (fn(x) ** 2).sum())(X)
    np.testing.assert_allclose(rows, whole, rtol=1e-5, atol=1e-4)
    hessian = jax.hessian(lambda x: (fn(x) ** 2).sum())(X[0])
    dense = np.asarray(dequantize_weight(weight))
    np.testing.assert_allclose(hessian, 2 * dense.T @ dense, rtol=1e-3, atol=1e-3)


MESH = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.mark.parametrize("kind", ["int8", "mxfp4"])
@pytest.mark.parametrize("rows, features", [("a", "b"), (None, ("a", "b")), (("a", "b"), None)])
def test_rows_and_features_shard_without_collectives(kind, rows, features):
    weight = WEIGHTS[kind]
    x = np.tile(X, (4, 1))
    over = P(features)

    def place(a, spec):
        return jax.device_put(a, NamedSharding(MESH, spec))

    sharded = jax.tree.map(lambda a: place(a, over), weight)
    operands = place(x, P(rows)), sharded, place(BIAS, over)
    fn = jax.jit(
        lambda x, w, b: msd_dot(x, w, bias=b), out_shardings=NamedSharding(MESH, P(rows, features))
    )
    hlo = fn.lower(*operands).compile().as_text()
    assert not [name for name in COLLECTIVES if name in hlo]
    want = msd_dot(x, weight, bias=BIAS)
    if kind == "int8":
        np.testing.assert_array_equal(fn(*operands), want)
    else:
        np.testing.assert_allclose(fn(*operands), want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "mxfp4"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_sharded_inner_dimension_needs_one_psum_of_each_shards_result(kind, check_vma):
    """Every shard splits its part of a row against its own maximum, which is never larger."""
    weight = WEIGHTS[kind]

    def local(x, w):
        return jax.lax.psum(msd_dot(x, w), "a")

    scale = P(None, "a") if kind == "mxfp4" else P()
    spec = jax.tree.map(lambda _: P(None, "a"), weight)
    spec = type(weight)(
        values=spec.values, scale=scale, format=weight.format, group_size=weight.group_size
    )
    fn = jax.jit(
        jax.shard_map(
            local, mesh=MESH, in_specs=(P(None, "a"), spec), out_specs=P(), check_vma=check_vma
        )
    )
    hlo = fn.lower(X, weight).compile().as_text()
    assert [name for name in COLLECTIVES if name in hlo] == ["all-reduce"]
    assert (np.abs(fn(X, weight) - _exact(X, weight)) <= _bound(X, weight)).all()
    gradient = jax.grad(lambda x: fn(x, weight).sum())(X)
    want = np.asarray(dequantize_weight(weight)).sum(0) * np.ones((6, 1))
    if check_vma:
        np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int8 in groups"])
def test_gradients_inside_shard_map_reach_sharded_rows_and_shared_scales(kind):
    weight = WEIGHTS[kind]
    x = np.tile(X, (4, 1))[:16]

    def loss(x, scale):
        def local(x, scale):
            y = msd_dot(x, weight.values, w_scale=scale, group_size=weight.group_size)
            return jax.lax.psum((y**2).sum(), ("a", "b"))

        return jax.shard_map(local, mesh=MESH, in_specs=(P(("a", "b")), P()), out_specs=P())(
            x, scale
        )

    def plain(x, scale):
        y = msd_dot(x, weight.values, w_scale=scale, group_size=weight.group_size)
        return (y**2).sum()

    got = jax.jit(jax.grad(loss, (0, 1)))(x, weight.scale)
    want = jax.grad(plain, (0, 1))(x, weight.scale)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["int8", "mxfp4"])
def test_export_round_trip_with_symbolic_rows(kind):
    weight = WEIGHTS[kind]
    (rows,) = export.symbolic_shape("rows")
    shape = jax.ShapeDtypeStruct((rows, 128), jnp.float32)
    exported = export.export(
        jax.jit(lambda x: msd_dot(x, weight, bias=BIAS)), platforms=("cpu", "cuda", "tpu")
    )(shape)
    again = export.deserialize(exported.serialize(vjp_order=1))
    want = msd_dot(X, weight, bias=BIAS)
    np.testing.assert_allclose(again.call(X), want, rtol=1e-6, atol=1e-5)
    gradient = jax.grad(lambda x: again.call(x).sum())(X)
    dense = np.asarray(dequantize_weight(weight))
    np.testing.assert_allclose(gradient, dense.sum(0) * np.ones((6, 1)), rtol=1e-4, atol=1e-5)


class _Layer(nnx.Module):
    """A W8A16 layer whose scales and bias are trained."""

    def __init__(self, w):
        weight = quantize_weight(w)
        self.values = nnx.Variable(weight.values)
        self.scale = nnx.Param(weight.scale)
        self.bias = nnx.Param(jnp.zeros(w.shape[0]))

    def __call__(self, x):
        return msd_dot(x, self.values[...], w_scale=self.scale[...], bias=self.bias[...])


def test_an_nnx_layer_trains_its_scales_and_bias():
    layer = _Layer(W)
    target = _exact(X, WEIGHTS["int8"]) * 1.5 + 1

    @nnx.jit
    def step(layer):
        loss, gradient = nnx.value_and_grad(lambda m: ((m(X) - target) ** 2).mean())(layer)
        state = nnx.state(layer, nnx.Param)
        rates = {"scale": 1e-6, "bias": 0.5}
        new = {k: state[k][...] - rates[k] * gradient[k][...] for k in rates}
        nnx.update(layer, nnx.State({k: state[k].replace(new[k]) for k in rates}))
        return loss

    losses = [float(step(layer)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_row_with_an_infinity_is_nan_under_jit_and_spares_the_others():
    x = X.copy()
    x[1, 3], x[2, 5] = np.inf, np.nan
    for weight in WEIGHTS.values():
        got = jax.jit(msd_dot)(x, weight)
        assert np.isnan(got[1:3]).all()
        np.testing.assert_array_equal(got[3:], jax.jit(msd_dot)(X, weight)[3:])


def test_zero_rows_give_the_bias_and_overflow_saturates():
    weight = WEIGHTS["int8"]
    zero = np.zeros((2, 128), np.float32)
    np.testing.assert_array_equal(msd_dot(zero, weight, bias=BIAS), np.stack([BIAS, BIAS]))
    huge = np.full((1, 128), 3e38, np.float32)
    got = np.asarray(msd_dot(huge, np.full((2, 128), 100, np.int8), w_scale=np.ones(2, np.float32)))
    np.testing.assert_array_equal(got, np.finfo(np.float32).max)


@pytest.mark.parametrize("format", ["int8", "mxfp4"])
def test_the_cost_is_one_product_that_reads_the_weights_once(format):
    (rows,) = export.symbolic_shape("rows")
    weight = jax.eval_shape(
        functools.partial(quantize_weight, format=format),
        jax.ShapeDtypeStruct((512, 256), jnp.float32),
    )
    program = trace(msd_dot, jax.ShapeDtypeStruct((rows, 256), jnp.bfloat16), weight)
    assert len(program.operations) == 1
    totals = program.totals({"rows": 8.0})
    products = 2 * 2 * 8 * 512 * 256
    assert totals["cube_flops_8bit"] == products / (2 if format == "mxfp4" else 1)
    stored = 512 * 128 + 512 * 8 if format == "mxfp4" else 512 * 256 + 512 * 4
    assert totals["read_bytes"] == stored + 8 * 256 * 2
    assert totals["write_bytes"] == 8 * 512 * 2
    assert totals["vector_bytes"] == 4 * 8 * (256 * 10 + 512 * 7)
