"""The helper: a primitive made by `define` behaves as its reference under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from cmjax import native
from cmjax.mesh import RANKED, RankMesh, on_every_rank
from cmjax.primitives.define import define


def _scaled_tanh(x, y, *, gain):
    return gain * jnp.tanh(x) * y


def _check(x, y, *, gain):
    if x.shape != y.shape:
        raise ValueError(f"test_scaled_tanh: shapes must agree, got {x.shape} and {y.shape}")


scaled_tanh_p = define("cm_test_scaled_tanh", _scaled_tanh, check=_check)
both_p = define(
    "cm_test_both",
    lambda x, *, axes: [x * 2, jnp.argmax(x, axis=-1).astype(jnp.int32)],
    multiple_results=True,
)
mean_p = define(
    "cm_test_mean",
    lambda x, *, axes: jax.lax.psum(x, axes) if axes else x,
    collective=True,
)


def _sums_by_kernel(x):
    word = jax.ShapeDtypeStruct((), jnp.int32)
    rows = x.reshape(-1, x.shape[-1])
    sums = [native.call("cmjax_sum_words", word, row) for row in rows]
    return jnp.stack(sums).reshape(x.shape[:-1])


sums_p = define(
    "cm_test_sums",
    lambda x: jnp.sum(x, axis=-1, dtype=jnp.int32),
    native=_sums_by_kernel,
)


def _f(x, y):
    return scaled_tanh_p.bind(x, y, gain=3.0)


TRANSFORMS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": jax.vmap,
    "jit of vmap": lambda f: jax.jit(jax.vmap(f)),
    "vmap of one operand": lambda f: (
        lambda x, y: jax.vmap(lambda i: f(x, y)[i], in_axes=0)(jnp.arange(x.shape[0]))
    ),
    "vmap of axis 1": lambda f: jax.vmap(f, in_axes=1, out_axes=1),
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x, y: jax.lax.scan(lambda c, xy: (c, f(*xy)), 0, (x, y))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_values_equal_numpy_under_every_transformation(transform):
    x, y = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    got = TRANSFORMS[transform](_f)(x, y)
    np.testing.assert_allclose(got, 3 * np.tanh(x) * y, rtol=1e-5)


def test_derivatives_of_all_orders_agree_with_differences():
    x, y = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    check_grads(jax.jit(_f), (x, y), order=2, modes=["fwd", "rev"], atol=2e-2, rtol=2e-2)
    check_grads(jax.vmap(_f), (x, y), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_the_jaxpr_shows_one_equation_also_when_differentiated():
    x = jnp.ones((3,))
    assert [e.primitive.name for e in jax.make_jaxpr(_f)(x, x).eqns] == ["cm_test_scaled_tanh"]
    gradient = jax.make_jaxpr(jax.value_and_grad(lambda x: _f(x, x).sum()))(x)
    assert [e.primitive.name for e in gradient.eqns].count("cm_test_scaled_tanh") == 1


def test_several_results_of_which_some_are_integers():
    x = jnp.array([[1.0, 3.0, 2.0], [5.0, 4.0, 0.0]])
    double, best = jax.vmap(lambda row: both_p.bind(row, axes=()))(x)
    np.testing.assert_array_equal(double, 2 * x)
    np.testing.assert_array_equal(best, [1, 0])
    gradient = jax.grad(lambda x: both_p.bind(x, axes=())[0].sum())(x)
    np.testing.assert_array_equal(gradient, jnp.full_like(x, 2))


def test_a_check_speaks_at_trace_time():
    with pytest.raises(ValueError, match=r"shapes must agree, got \(2,\) and \(3,\)"):
        jax.eval_shape(_f, jnp.ones(2), jnp.ones(3))


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_inside_shard_map_reach_sharded_and_replicated_operands(check_vma):
    mesh = RankMesh(2, 4).plain()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    y = jnp.ones((1, 3))

    def loss(x, y):
        def local(x, y):
            return jax.lax.psum(_f(x, y).sum(), ("node", "npu"))

        spec = P(("node", "npu"))
        return jax.shard_map(
            local, mesh=mesh, in_specs=(spec, P()), out_specs=P(), check_vma=check_vma
        )(x, y)

    gx, gy = jax.jit(jax.grad(loss, (0, 1)))(x, y)
    np.testing.assert_allclose(gx, 3 / np.cosh(x) ** 2, rtol=1e-4)
    np.testing.assert_allclose(gy[0], 3 * np.tanh(x).sum(0), rtol=1e-4)


@pytest.mark.parametrize("mesh", [RankMesh(2, 4), RankMesh(2, 2, 2), RankMesh(1, 8)], ids=str)
def test_a_collective_primitive_decomposes_over_virtual_axes(mesh):
    fn = on_every_rank(lambda x: mean_p.bind(x, axes=mesh.axes), mesh, RANKED, RANKED)
    got = jax.block_until_ready(jax.jit(fn)(jnp.arange(8.0)))
    np.testing.assert_array_equal(got, np.full(8, 28.0))


def test_an_ordinary_vmap_of_a_collective_primitive_maps_it():
    got = jax.vmap(lambda x: mean_p.bind(x, axes=()))(jnp.arange(3.0))
    np.testing.assert_array_equal(got, np.arange(3.0))


def _runs_kernel(fn, *args):
    return "cmjax_sum_words" in jax.jit(fn).lower(*args).as_text()


@pytest.mark.skipif(not native.status().enabled, reason=native.status().reason)
def test_a_kernel_runs_on_one_device_and_inside_shard_map_only():
    x = np.arange(24, dtype=np.int32).reshape(8, 3)
    assert _runs_kernel(sums_p.bind, x)
    assert _runs_kernel(jax.vmap(sums_p.bind), x)
    mesh = jax.make_mesh((8,), ("rank",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, P("rank")))
    assert not _runs_kernel(sums_p.bind, sharded)  # XLA would gather a custom call's operands
    inside = jax.shard_map(sums_p.bind, mesh=mesh, in_specs=P("rank"), out_specs=P("rank"))
    assert _runs_kernel(inside, sharded)
    for got in (sums_p.bind(x), jax.jit(sums_p.bind)(sharded), jax.jit(inside)(sharded)):
        np.testing.assert_array_equal(got, x.sum(1))


def test_an_exported_program_holds_no_kernel():
    x = jnp.arange(24, dtype=jnp.int32).reshape(8, 3)
    exported = export.export(jax.jit(sums_p.bind))(x)
    assert "cmjax_sum_words" not in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(x), x.sum(1))


def test_a_primitive_runs_without_jit():
    with jax.disable_jit():
        np.testing.assert_allclose(_f(jnp.ones(3), jnp.ones(3)), 3 * np.tanh(1.0), rtol=1e-6)
