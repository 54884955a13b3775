"""All-gather and reduce-scatter of a tensor-parallel group against NumPy, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.mesh import RANKED, RankMesh, on_every_rank
from cmjax.primitives.tensor import gather_group, scatter_sum
from cmjax.program import trace

MESHES = [
    RankMesh(4, 2, 1, tensor=2),
    RankMesh(2, 2, 2, tensor=2),
    RankMesh(2, 2, 2, tensor=4),
    RankMesh(1, 4, 2, tensor=4),
    RankMesh(1, 8, 1, tensor=4),
    RankMesh(1, 4, 2, tensor=8),
]


def _run(fn, mesh, x, virtual=True):
    lifted = on_every_rank(fn, mesh, RANKED, RANKED, virtual=virtual)
    return np.asarray(jax.block_until_ready(jax.jit(lifted)(x)))


@pytest.mark.parametrize("virtual", [True, False])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_neighbours_gather_in_rank_order_and_get_their_part_of_the_sum(mesh, virtual):
    t = mesh.tensor
    x = np.random.default_rng(0).normal(size=(8, t, 3)).astype(np.float32)
    groups = x.reshape(8 // t, t, t, 3)
    gathered = _run(lambda v: gather_group(v, mesh.tensor_axes), mesh, x, virtual)
    want = groups.reshape(8 // t, 1, t * t, 3).repeat(t, 1)
    np.testing.assert_array_equal(gathered.reshape(want.shape), want)
    scattered = _run(lambda v: scatter_sum(v, mesh.tensor_axes), mesh, x, virtual)
    np.testing.assert_allclose(scattered.reshape(8 // t, t, 3), groups.sum(1), rtol=1e-5)


def test_gathering_is_the_transpose_of_summing_into_parts():
    mesh = RankMesh(2, 2, 2, tensor=4)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(8, 2, 3)).astype(np.float32)
    y = rng.normal(size=(8, 8, 3)).astype(np.float32)
    axes = mesh.tensor_axes
    forward = _run(lambda v: gather_group(v, axes), mesh, x)

    def pulled(pair):
        return jax.vjp(lambda v: gather_group(v, axes), pair[0])[1](pair[1])[0]

    lifted = on_every_rank(pulled, mesh, RANKED, RANKED)
    back = np.asarray(jax.jit(lifted)((x, y)))
    np.testing.assert_allclose((forward * y).sum(), (back * x).sum(), rtol=1e-4)
    np.testing.assert_allclose(
        back.reshape(2, 4, 2, 3), y.reshape(2, 4, 4, 2, 3).sum(1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("mesh", "die", "node"),
    [(RankMesh(2, 4, 2, tensor=2), 1, 0), (RankMesh(2, 4, 2, tensor=4), 1, 2)],
    ids=str,
)
def test_a_rank_sends_its_part_to_every_neighbour_directly(mesh, die, node):
    def step(x):
        return scatter_sum(gather_group(x, mesh.tensor_axes), mesh.tensor_axes)

    fn = on_every_rank(step, mesh, RANKED, RANKED, abstract=True)
    x = jax.ShapeDtypeStruct((mesh.ranks, 5, 7), jnp.bfloat16)
    total = trace(fn, x).totals({})
    part = 5 * 7 * 2
    assert total["die_bytes"] == 2 * part * die
    assert total["node_bytes"] == 2 * part * node
    assert total["supernode_bytes"] == 0
    assert total["launches"] == 2


def test_the_second_half_of_an_all_reduce_moves_as_much_and_launches_nothing():
    mesh = RankMesh(2, 4, 2, tensor=4)

    def total(joined):
        def step(x):
            return gather_group(scatter_sum(x, mesh.tensor_axes), mesh.tensor_axes, joined=joined)

        fn = on_every_rank(step, mesh, RANKED, RANKED, abstract=True)
        return trace(fn, jax.ShapeDtypeStruct((mesh.ranks, 8, 7), jnp.bfloat16)).totals({})

    apart, together = total(False), total(True)
    assert (apart.pop("launches"), together.pop("launches")) == (2, 1)
    assert apart == together


def test_without_a_group_nothing_moves():
    x = jnp.arange(3.0)
    assert gather_group(x, ()) is x and scatter_sum(x, ()) is x
