"""Counted bytes: of an even and an uneven routing, of every exchange, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cmjax.mesh import RANKED, RankMesh, on_every_rank
from cmjax.primitives.exchange import combine, dispatch, gather_ranks
from cmjax.primitives.tensor import gather_group, scatter_sum
from cmjax.program import trace
from cmjax.program.mark import permuted
from cmjax.verify.compiled import device_bytes
from cmjax.verify.traffic import TIERS, count_traffic, pair_bytes, priced_bytes, tier_bytes

MESHES = [RankMesh(2, 4), RankMesh(2, 2, 2), RankMesh(1, 2, 2), RankMesh(4, 1, 2)]
HIDDEN, TOKENS = 4, 3


def _counted(fn, mesh, *args):
    lifted = on_every_rank(count_traffic(fn, mesh), mesh, RANKED, RANKED)
    return jax.block_until_ready(jax.jit(lifted)(*args))


def _program(fn, mesh, *args):
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    return trace(on_every_rank(fn, mesh, RANKED, RANKED, abstract=True), *shapes)


def _sum(parts):
    return {tier: sum(part[tier] for part in parts) for tier in TIERS}


def _layers(mesh, *, capacity=TOKENS, held=2, length=3):
    """A loop of dispatch, expert and combine, with a gather and an exchange of float16 beside."""
    how = {"axes": mesh.axes, "ranks": mesh.ranks, "slots_per_rank": held, "capacity": capacity}

    def layer(x, slots):
        sent = dispatch(x, slots, **how)
        weights = jnp.ones(slots.shape)
        x = x + combine(sent.rows * 0.5, slots, sent.position, weights, **how)
        everyone = gather_ranks(x, mesh.axes)
        shares = jnp.broadcast_to(x[:1].astype(jnp.float16), (mesh.ranks, HIDDEN))
        back = lax.all_to_all(shares, mesh.axes, 0, 0, tiled=True)
        return x + jnp.mean(everyone, axis=0) + jnp.mean(back.astype(x.dtype), axis=0)

    def fn(x, slots):
        return lax.scan(lambda x, _: (layer(x, slots), None), x, None, length=length)[0]

    return fn


def _inputs(mesh, copies=2, held=2):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(mesh.ranks, TOKENS, HIDDEN)).astype(np.float32)
    slots = rng.permuted(np.tile(np.arange(mesh.ranks * held), (mesh.ranks, TOKENS, 1)), axis=-1)
    return x, slots[..., :copies].astype(np.int32)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_moved_bytes_equal_the_price_at_the_same_capacity_tier_by_tier(mesh):
    fn, args = _layers(mesh), _inputs(mesh)
    out, found = _counted(fn, mesh, *args)
    np.testing.assert_allclose(out, jax.jit(on_every_rank(fn, mesh, RANKED, RANKED))(*args))
    moved = [tier_bytes(pair_bytes(r.moved), mesh) for n, r in found.items() if "flags" not in n]
    total, priced = _sum(moved), priced_bytes(_program(fn, mesh, *args), {}, mesh)
    assert {tier: total[tier] for tier in priced} == pytest.approx(priced, rel=1e-12)
    assert total["supernode"] > 0 or mesh.nodes == 1


@pytest.mark.parametrize("mesh", [RankMesh(2, 2, 2), RankMesh(1, 2, 2)], ids=str)
def test_gathers_and_sums_of_a_group_count_as_they_are_priced(mesh):
    """Over all axes and over some, in a loop."""
    inner = mesh.axes[1:]

    def fn(x):
        def step(x, _):
            part = scatter_sum(gather_group(x, mesh.axes), mesh.axes)
            return gather_group(scatter_sum(part, inner), inner), None

        return lax.scan(step, x, None, length=2)[0]

    x = np.ones((mesh.ranks, 8, HIDDEN), np.float32)
    _, found = _counted(fn, mesh, x)
    total = _sum([tier_bytes(pair_bytes(r.moved), mesh) for r in found.values()])
    priced = priced_bytes(_program(fn, mesh, x), {}, mesh)
    assert {tier: total[tier] for tier in priced} == priced
    assert total["die"] > 0


@pytest.mark.parametrize("mesh", [RankMesh(2, 4), RankMesh(4, 1, 2)], ids=str)
def test_the_executable_moves_between_devices_what_was_counted_between_nodes(mesh):
    fn, args = _layers(mesh), _inputs(mesh)
    _, found = _counted(fn, mesh, *args)
    lifted = on_every_rank(fn, mesh, RANKED, RANKED)
    text = jax.jit(lifted).lower(*args).compile().as_text()
    wanted = 0
    for name, received in found.items():
        between = tier_bytes(pair_bytes(received.moved), mesh)["supernode"]
        if name.startswith("all_gather"):  # the same for all virtual ranks of a device
            between //= mesh.ranks // mesh.nodes
        wanted += 0 if name.startswith("flags") else between  # nobody reads the flags
    assert device_bytes(text, mesh.nodes) == wanted > 0


def test_real_rows_are_those_routed_from_each_rank_to_each():
    mesh, held = RankMesh(2, 2, 2), 2
    x, slots = _inputs(mesh)
    _, found = _counted(_layers(mesh, length=1), mesh, x, slots)
    wanted = np.zeros((8, 8), int)
    for rank in range(8):
        for slot in slots[rank].ravel():
            wanted[rank, slot // held] += HIDDEN * 4
    np.testing.assert_array_equal(pair_bytes(found["dispatch.0"].rows), wanted)
    np.testing.assert_array_equal(pair_bytes(found["combine.0"].rows), wanted.T)


def test_dropped_rows_do_not_count():
    mesh = RankMesh(2, 4)
    x = np.ones((8, TOKENS, HIDDEN), np.float32)
    everyone_to_slot_3 = np.full((8, TOKENS, 1), 3, np.int32)
    fn = _layers(mesh, capacity=2, held=1, length=1)
    _, found = _counted(fn, mesh, x, everyone_to_slot_3)
    for name in ("dispatch.0", "combine.0"):
        assert pair_bytes(found[name].rows).sum() == 8 * 2 * HIDDEN * 4


def test_under_even_routing_real_rows_equal_the_price_too():
    mesh = RankMesh(2, 2, 2)
    x = np.ones((8, 2, HIDDEN), np.float32)
    slots = np.arange(16, dtype=np.int32).reshape(1, 2, 8).repeat(8, 0)  # one row to every slot

    def fn(x, slots):
        how = {"axes": mesh.axes, "ranks": 8, "slots_per_rank": 2, "capacity": 1}
        sent = dispatch(x, slots, **how)
        return combine(sent.rows, slots, sent.position, jnp.ones(slots.shape), **how)

    _, found = _counted(fn, mesh, x, slots)
    rows = _sum(
        [tier_bytes(pair_bytes(r.rows), mesh) for r in found.values() if r.rows is not None]
    )
    priced = priced_bytes(_program(fn, mesh, x, slots), {}, mesh)
    assert {tier: rows[tier] for tier in priced} == pytest.approx(priced, rel=1e-12)


def test_int8_rows_travel_with_their_scale():
    mesh = RankMesh(2, 2)
    x, slots = np.ones((4, TOKENS, HIDDEN), np.float32), np.zeros((4, TOKENS, 1), np.int32)

    def fn(x, slots):
        return dispatch(x, slots, axes=mesh.axes, ranks=4, slots_per_rank=1, quantize=True).dropped

    _, found = _counted(fn, mesh, x, slots)
    per_row = HIDDEN + 4
    np.testing.assert_array_equal(pair_bytes(found["dispatch.0"].moved), TOKENS * per_row)
    assert pair_bytes(found["dispatch.0"].rows)[:, 0].tolist() == [TOKENS * per_row] * 4


def test_tiers_are_own_die_node_supernode_for_every_pair():
    mesh = RankMesh(2, 3, 2)
    ranks = [(node, npu, die) for node in range(2) for npu in range(3) for die in range(2)]
    for a, first in enumerate(ranks):
        for b, second in enumerate(ranks):
            pairs = np.zeros((12, 12), int)
            pairs[a, b] = 7
            same = [x == y for x, y in zip(first, second, strict=True)]
            wanted = (
                "own" if all(same) else "die" if same[0] and same[1]
                else "node" if same[0] else "supernode"
            )  # fmt: skip
            assert tier_bytes(pairs, mesh) == dict.fromkeys(TIERS, 0) | {wanted: 7}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("size", [8, 5], ids=["divides", "does not"])
def test_reductions_move_what_their_price_says(mesh, size):
    def fn(x):
        parts = lax.psum_scatter(jnp.tile(x, mesh.npus), "npu", tiled=True)  # one axis under vmap
        return parts + lax.psum(x, mesh.axes[:2]) + lax.pmax(x, mesh.axes[-1])

    x = jnp.ones((mesh.ranks, size))
    _, found = _counted(fn, mesh, x)
    total = _sum([tier_bytes(pair_bytes(r.moved), mesh) for r in found.values()])
    priced = priced_bytes(_program(fn, mesh, x), {}, mesh)
    assert {tier: total[tier] for tier in priced} == pytest.approx(priced, rel=1e-12)


def test_what_nobody_reads_of_a_permutation_does_not_count():
    """`vmap` permutes all ranks or none: what fills a permutation up is left out."""
    mesh = RankMesh(1, 4)
    _, found = _counted(lambda x: permuted(x, "npu", [(0, 1)], fill=4), mesh, jnp.ones((4, 3)))
    wanted = np.zeros((4, 4), int)
    wanted[0, 1] = 12
    np.testing.assert_array_equal(pair_bytes(found["ppermute.0"].moved), wanted)


def test_an_exchange_that_runs_nobody_knows_how_often_is_refused():
    def fn(x):
        return lax.while_loop(lambda x: x[0] < 9, lambda x: lax.psum(x, "npu"), x)

    mesh = RankMesh(2, 2)
    lifted = on_every_rank(count_traffic(fn, mesh), mesh, RANKED, RANKED)
    with pytest.raises(ValueError, match="how often 'while' sends"):
        jax.jit(lifted)(jnp.ones((4, 3)))
