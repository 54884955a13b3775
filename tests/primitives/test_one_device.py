"""Which of two forms a program of ranks takes; the written one is priced and counted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cmjax.mesh import RANKED, REPLICATED, RankMesh, on_every_rank
from cmjax.primitives.one_device import on_one_device
from cmjax.program import trace
from cmjax.verify.traffic import count_traffic, pair_bytes, priced_bytes, tier_bytes

TOGETHER = [RankMesh(1, 8), RankMesh(1, 2, 4), RankMesh(1, 4, 2), RankMesh(1, 1)]
APART = [RankMesh(2, 4), RankMesh(2, 2, 2), RankMesh(8, 1)]
MARK = 1000.0  # what the form of all ranks adds in these tests, to tell which one ran


def _turned(mesh, mark=0.0):
    """Every rank's `x` times the next one's `y`, written twice."""

    def apart(x, y):
        everyone = y[None]
        for axis in reversed(mesh.axes):
            everyone = lax.all_gather(everyone, axis, axis=0, tiled=True)
        return x * everyone[(lax.axis_index(mesh.axes) + 1) % mesh.ranks]

    def together(x, y):
        return x * jnp.roll(y, -1, axis=0) + mark

    return lambda x, y: on_one_device(apart, together, x, y, axes=mesh.axes)


def _inputs(mesh):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(mesh.ranks, 3)).astype(np.float32) for _ in range(2))


def _run(fn, mesh, *args, specs: Any = RANKED, virtual=True):
    lifted = on_every_rank(fn, mesh, specs, RANKED, virtual=virtual)
    return np.asarray(jax.block_until_ready(jax.jit(lifted)(*args)))


@pytest.mark.parametrize("mesh", TOGETHER, ids=str)
def test_ranks_of_one_device_run_together_in_their_order(mesh):
    x, y = _inputs(mesh)
    found = _run(_turned(mesh, MARK), mesh, x, y)
    np.testing.assert_allclose(found, x * np.roll(y, -1, axis=0) + MARK)


@pytest.mark.parametrize("virtual", [True, False])
@pytest.mark.parametrize("mesh", APART, ids=str)
def test_ranks_of_several_devices_run_what_is_written(mesh, virtual):
    x, y = _inputs(mesh)
    found = _run(_turned(mesh, MARK), mesh, x, y, virtual=virtual)
    np.testing.assert_allclose(found, x * np.roll(y, -1, axis=0), rtol=1e-6)


def test_in_a_loop_ranks_run_together_too():
    mesh = RankMesh(1, 2, 4)
    x, y = _inputs(mesh)
    fn = _turned(mesh, MARK)

    def loop(x, y):
        return lax.scan(lambda x, _: (fn(x, y), None), x, None, length=2)[0]

    next_one = np.roll(y, -1, axis=0)
    want = (x * next_one + MARK) * next_one + MARK
    np.testing.assert_allclose(_run(loop, mesh, x, y), want, rtol=1e-6)


def test_what_is_the_same_on_all_ranks_is_given_once_to_each():
    mesh = RankMesh(1, 4)
    x, y = _inputs(mesh)
    found = _run(_turned(mesh, MARK), mesh, x, y[0], specs=(RANKED, REPLICATED))
    np.testing.assert_allclose(found, x * y[0] + MARK, rtol=1e-6)


def test_a_batch_that_is_no_axis_of_ranks_runs_what_is_written():
    mesh = RankMesh(1, 4)
    x, y = (np.stack([a, 2 * a], 1) for a in _inputs(mesh))
    found = _run(jax.vmap(_turned(mesh, MARK)), mesh, x, y)
    np.testing.assert_allclose(found, x * np.roll(y, -1, axis=0), rtol=1e-6)


@pytest.mark.parametrize("mesh", [*TOGETHER, *APART], ids=str)
@pytest.mark.parametrize("outside", [True, False])
def test_gradients_are_those_of_the_formula(mesh, outside):
    x, y = _inputs(mesh)
    fn = _turned(mesh)
    if outside:
        lifted = on_every_rank(fn, mesh, RANKED, RANKED)
        gradient = jax.jit(jax.grad(lambda x, y: (lifted(x, y) ** 2).sum(), (0, 1)))
    else:
        # of the sum over ranks: what a rank's own loss gives, added up where `y` came from
        one = jax.grad(lambda x, y: (fn(x, y) ** 2).sum(), (0, 1))
        gradient = jax.jit(on_every_rank(one, mesh, RANKED, RANKED))
    dx, dy = jax.block_until_ready(gradient(x, y))
    next_one = np.roll(y, -1, axis=0)
    np.testing.assert_allclose(dx, 2 * x * next_one**2, rtol=1e-4)
    np.testing.assert_allclose(dy, np.roll(2 * x**2 * next_one, 1, axis=0), rtol=1e-4)


@pytest.mark.parametrize("mesh", [RankMesh(1, 2, 4), RankMesh(2, 2, 2)], ids=str)
def test_the_written_form_is_priced_and_counted(mesh):
    x, y = _inputs(mesh)
    fn = _turned(mesh, MARK)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, y)]
    program = trace(on_every_rank(fn, mesh, RANKED, RANKED, abstract=True), *shapes)
    priced = priced_bytes(program, {}, mesh)
    lifted = on_every_rank(count_traffic(fn, mesh), mesh, RANKED, RANKED)
    out, found = jax.block_until_ready(jax.jit(lifted)(x, y))
    np.testing.assert_allclose(out, x * np.roll(y, -1, axis=0), rtol=1e-6)
    total = {tier: 0 for tier in priced}
    for received in found.values():
        each = tier_bytes(pair_bytes(received.moved), mesh)
        total = {tier: total[tier] + each[tier] for tier in total}
    assert total == priced and sum(priced.values()) > 0
