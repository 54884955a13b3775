"""Programs under a user's own `shard_map`: what a rank reads, and which links its axes lie on."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from cmjax.cost import price
from cmjax.hardware import load_machine
from cmjax.program import Axes, ranks_on_tiers, trace

M = load_machine("cloudmatrix384")
F32, BF16 = jnp.float32, jnp.bfloat16
RANKS = 8
TIERS = ("die_bytes", "node_bytes", "supernode_bytes")


def mesh(**axes):
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def array(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def sharded(fn, in_specs, out_specs, over=None):
    return jax.shard_map(fn, mesh=over or mesh(model=RANKS), in_specs=in_specs, out_specs=out_specs)


def traffic(program, **sizes):
    totals = program.totals(sizes)
    return totals["read_bytes"], totals["write_bytes"]


def doubled(x):
    return jnp.tanh(x) * 2


def test_a_rank_reads_its_shard_of_an_argument():
    (n,) = jax.export.symbolic_shape("n")
    program = trace(sharded(doubled, P("model"), P("model")), array(RANKS * n, 64))
    shard = 1e6 * 64 * 4
    assert traffic(program, n=1e6) == (shard, shard)
    alone = trace(doubled, array(n, 64))
    assert traffic(program, n=1e6) == traffic(alone, n=1e6)
    assert program.totals({"n": 1e6}) == alone.totals({"n": 1e6})
    assert float(price(program, M, {"n": 1e6}).total_s) == pytest.approx(
        float(price(alone, M, {"n": 1e6}).total_s), rel=1e-6
    )


@pytest.mark.parametrize("rows, inner, wide", [(64, 1024, 2048), (8, 256, 512)])
def test_a_tensor_parallel_product_reads_its_part_of_the_weights(rows, inner, wide):
    def up_and_down(x, up, down):
        return lax.psum((x @ up) @ down, "model")

    specs = (P(), P(None, "model"), P("model", None))
    args = (
        array(rows, inner, dtype=BF16),
        array(inner, wide, dtype=BF16),
        array(wide, inner, dtype=BF16),
    )
    program = trace(sharded(up_and_down, specs, P()), *args, tiers={"model": "node"})
    first, second, _ = program.operations
    part = wide // RANKS
    assert first.work.read_bytes == 2 * (rows * inner + inner * part)
    assert first.work.write_bytes == 2 * rows * part
    assert second.work.read_bytes == 2 * (rows * part + part * inner)
    assert program.totals({})["flops"] - rows * inner == 2 * 2 * rows * inner * part


def test_slices_of_a_shard_together_read_no_more_than_the_shard():
    def overlapping(x):
        return x[:6] + x[2:]

    program = trace(sharded(overlapping, P("model"), P("model")), array(RANKS * 8, 64))
    assert traffic(program) == (8 * 64 * 4, 6 * 64 * 4)


def test_a_replicated_argument_is_read_whole():
    def scaled(x, row):
        return x * row

    program = trace(sharded(scaled, (P("model"), P()), P("model")), array(RANKS * 8, 64), array(64))
    assert traffic(program) == ((8 * 64 + 64) * 4, 8 * 64 * 4)


def test_what_stands_outside_is_whole_and_a_kernel_of_its_own():
    def around(x):
        return jnp.exp(sharded(doubled, P("model"), P("model"))(jnp.exp(x)))

    program = trace(around, array(RANKS * 8, 64))
    shard, whole = 8 * 64 * 4, RANKS * 8 * 64 * 4
    operations = [op for op in program.operations if op.work.column("launches").terms]
    assert [op.name for op in operations] == ["exp", "tanh+mul", "exp"]
    outside, inside, after = (op.work for op in operations)
    assert (outside.read_bytes, outside.write_bytes) == (whole, whole)
    assert inside.column("vector_bytes") == 5 * shard
    assert (inside.read_bytes, inside.write_bytes) == (shard, shard)
    assert (after.read_bytes, after.write_bytes) == (whole, whole)


def test_a_shard_map_in_a_loop_and_under_grad_keeps_its_shards():
    f = sharded(doubled, P("model"), P("model"))

    def layers(x):
        return jnp.sum(lax.scan(lambda x, _: (f(x), None), x, length=3)[0])

    shard = 8 * 64
    program = trace(layers, array(RANKS * 8, 64))
    assert program.totals({})["transcendentals"] == 3 * shard
    backward = trace(jax.grad(layers), array(RANKS * 8, 64))
    assert backward.totals({})["transcendentals"] == 3 * shard


def reduce_over(axes, over, **options):
    def fn(x):
        return lax.psum(x, axes)

    program = trace(sharded(fn, P(), P(), over), array(16, 64), **options)
    totals = program.totals({})
    return tuple(totals[tier] for tier in TIERS)


BYTES = 16 * 64 * 4


def sent(die, node, supernode):
    """Bytes of an all-reduce by tier, for so many ranks of a group on each."""
    ranks = die * node * supernode
    peers = (die - 1, (node - 1) * die, (supernode - 1) * node * die)
    return tuple(pytest.approx(2 * BYTES * count / ranks) for count in peers)


@pytest.mark.parametrize(
    "tiers, on",
    [
        ({"model": "die"}, (8, 1, 1)),
        ({"model": "node"}, (1, 8, 1)),
        ({"model": "supernode"}, (1, 1, 8)),
        ({"model": {"die": 2, "node": 4}}, (2, 4, 1)),
        ({"model": {"node": 4, "supernode": 2}}, (1, 4, 2)),
    ],
)
def test_an_axis_of_any_name_lies_where_it_is_said_to(tiers, on):
    assert reduce_over("model", mesh(model=8), tiers=tiers) == sent(*on)


@pytest.mark.parametrize(
    "axes, over, on",
    [
        ("model", {"model": 8}, (2, 4, 1)),
        ("model", {"data": 24, "model": 16}, (2, 8, 1)),
        ("data", {"data": 24, "model": 16}, (1, 1, 24)),
        ("data", {"data": 4, "model": 8}, (1, 2, 2)),
        (("data", "model"), {"data": 4, "model": 8}, (2, 8, 2)),
        ("b", {"a": 2, "b": 2, "c": 2}, (1, 2, 1)),
        # `die` says where it lies; the other axis gets what is left.
        ("model", {"model": 8, "die": 2}, (1, 8, 1)),
    ],
)
def test_a_machine_lays_other_axes_row_major(axes, over, on):
    assert reduce_over(axes, mesh(**over), machine=M) == sent(*on)


def test_the_machines_layout_is_that_of_ranks_numbered_in_order():
    """Brute force: the coordinates of every device number on the mesh and on the machine."""
    data, model = 6, 16
    axes = Axes({"data": data, "model": model}, machine=M)
    dies, npus = M.dies_per_npu, M.npus_per_node
    places = {n: (n // (dies * npus), n // dies % npus, n % dies) for n in range(data * model)}
    for name, group in (("model", range(model)), ("data", range(0, data * model, model))):
        found = ranks_on_tiers(name, axes)
        nodes = {places[n][0] for n in group}
        own_node = [n for n in group if places[n][0] == places[0][0]]
        own_npu = [n for n in own_node if places[n][1] == places[0][1]]
        assert found["supernode"] == len(nodes)
        assert found["node"] * found["die"] == len(own_node)
        assert found["die"] == len(own_npu)


def test_axes_named_after_the_fabric_need_no_tiers():
    over = mesh(node=4, npu=8, die=2)
    for axes, on in (("die", (2, 1, 1)), ("npu", (1, 8, 1)), (("node", "die"), (2, 1, 4))):
        assert reduce_over(axes, over) == reduce_over(axes, over, machine=M) == sent(*on)


@pytest.mark.parametrize(
    "over, options, message",
    [
        (
            {"model": 8},
            {},
            "collective over mesh axis 'model': the fabric knows 'node', 'npu' and 'die'; say "
            "where this one lies, such as tiers={'model': 'node'}, or give a machine",
        ),
        (
            {"model": 8},
            {"tiers": {"model": "rack"}},
            "tiers: axis 'model' cannot lie on 'rack'; the tiers are die, node, supernode",
        ),
        (
            {"model": 8},
            {"tiers": {"model": {"die": 2}}},
            "tiers: axis 'model' has 8 ranks, but {'die': 2} makes 2",
        ),
        (
            {"model": 8},
            {"tiers": {"model": "node", "modle": "node"}},
            "tiers: the program has no mesh axis 'modle'; its axes are model",
        ),
        (
            {"model": 3},
            {"machine": M},
            "collective over mesh axis 'model': its 3 ranks do not lie evenly on cloudmatrix384 "
            "(2 dies an NPU, 8 NPUs a node); say where they lie, such as tiers={'model': 'node'}",
        ),
        (
            {"model": 1536},
            {"machine": M},
            "collective over mesh axis 'model': the mesh has more ranks than cloudmatrix384, which "
            "has 768",
        ),
    ],
)
def test_an_axis_that_lies_nowhere_is_refused(over, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        reduce_over("model", mesh(**over), **options)


def test_tiers_of_axes_without_collectives_need_not_be_known():
    program = trace(sharded(doubled, P("model"), P("model")), array(RANKS * 8, 64))
    assert all(program.totals({})[tier] == 0 for tier in TIERS)
