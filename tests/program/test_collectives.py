"""Bytes of collectives: against compiled HLO, and per tier against a count over pairs of ranks."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from cmjax.mesh import RANKED, RankMesh, on_every_rank
from cmjax.primitives import combine, dispatch
from cmjax.program import exchange, tier_shares, trace
from cmjax.program.size import Size

MESH = RankMesh(2, 2, 2)
COORDINATES = list(itertools.product(*map(range, MESH.shape)))
F32 = jnp.float32
LOCAL = (16, 4)
BYTES = math.prod(LOCAL) * 4
X = jax.ShapeDtypeStruct((MESH.ranks, *LOCAL), F32)
TIERS = ("die_bytes", "node_bytes", "supernode_bytes")

AXES = [axes for n in (1, 2, 3) for axes in itertools.combinations(MESH.axes, n)]


def tier(a: tuple[int, ...], b: tuple[int, ...]) -> str:
    """The links between two ranks, given as (node, npu, die)."""
    if a[0] != b[0]:
        return "supernode_bytes"
    return "node_bytes" if a[1] != b[1] else "die_bytes"


def peers(rank, axes, mesh=MESH):
    """The other ranks of a rank's group."""
    fixed = [i for i, name in enumerate(mesh.axes) if name not in axes]
    everyone = itertools.product(*map(range, mesh.shape))
    return [r for r in everyone if r != rank and all(r[i] == rank[i] for i in fixed)]


def by_pairs(axes, bytes_to_a_peer: float) -> dict[str, float]:
    """Bytes that rank 0 sends, by tier, if every peer gets as many."""
    found = dict.fromkeys(TIERS, 0.0)
    for peer in peers(COORDINATES[0], axes):
        found[tier(COORDINATES[0], peer)] += bytes_to_a_peer
    return found


COLLECTIVES = {
    # name: (per-rank function, bytes sent to each peer by n ranks, HLO operation)
    "all_to_all": (
        lambda axes: lambda x: lax.all_to_all(x, axes, 0, 0, tiled=True),
        lambda n: BYTES / n,
        "all-to-all",
    ),
    "all_gather": (
        lambda axes: lambda x: lax.all_gather(x, axes, axis=0, tiled=True),
        lambda n: BYTES,
        "all-gather",
    ),
    "reduce_scatter": (
        lambda axes: lambda x: lax.psum_scatter(x, axes, scatter_dimension=0, tiled=True),
        lambda n: BYTES / n,
        "reduce-scatter",
    ),
    "psum": (lambda axes: lambda x: lax.psum(x, axes), lambda n: 2 * BYTES / n, "all-reduce"),
    "pmax": (lambda axes: lambda x: lax.pmax(x, axes), lambda n: 2 * BYTES / n, "all-reduce"),
}
# What one rank sends, from what the HLO operation returns on a rank.
SENT_FROM_RESULT = {
    "all-to-all": lambda result, n: result * (n - 1) / n,
    "all-gather": lambda result, n: result * (n - 1) / n,
    "reduce-scatter": lambda result, n: result * (n - 1),
    "all-reduce": lambda result, n: 2 * result * (n - 1) / n,
    "collective-permute": lambda result, n: result,
}


def lifted(fn, arguments=1, *, abstract):
    return on_every_rank(fn, MESH, (RANKED,) * arguments, RANKED, abstract=abstract, virtual=False)


def tiers_of(program) -> dict[str, float]:
    totals = program.totals({})
    return {name: totals[name] for name in TIERS}


def in_hlo(fn, *args) -> list[tuple[str, int]]:
    """(operation, bytes of its result on a rank) of every collective XLA compiled."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    names = "|".join(SENT_FROM_RESULT)
    found = []
    for result, name in re.findall(rf"= (\(.*?\)|\S+) ({names})(?:-start)?\(", text):
        arrays = re.findall(r"\b([a-z]+)(\d+)\[([\d,]*)\]", result)
        sizes = [int(bits) // 8 * math.prod(map(int, d.split(","))) for _, bits, d in arrays]
        found.append((name, sum(sizes)))
    return found


@pytest.mark.parametrize("axes", AXES, ids="-".join)
@pytest.mark.parametrize("name", COLLECTIVES)
def test_bytes_by_tier_are_a_count_over_pairs_of_ranks(name, axes):
    make, to_a_peer, _ = COLLECTIVES[name]
    n = len(peers(COORDINATES[0], axes)) + 1
    program = trace(lifted(make(axes), abstract=True), X)
    assert tiers_of(program) == pytest.approx(by_pairs(axes, to_a_peer(n)), rel=1e-12)
    (operation,) = program.operations
    furthest = max(MESH.axes[::-1].index(a) for a in axes)
    assert (operation.work.kind, operation.work.reach) == ("collective", furthest)


@pytest.mark.parametrize("axes", [("die",), ("node",), ("npu", "die"), MESH.axes], ids="-".join)
@pytest.mark.parametrize("name", COLLECTIVES)
def test_bytes_are_those_of_the_compiled_collective(name, axes):
    make, _, operation = COLLECTIVES[name]
    n = len(peers(COORDINATES[0], axes)) + 1
    ((compiled, result),) = in_hlo(lifted(make(axes), abstract=False), X)
    assert compiled == operation
    sent = sum(tiers_of(trace(lifted(make(axes), abstract=True), X)).values())
    assert sent == SENT_FROM_RESULT[operation](result, n)


@pytest.mark.parametrize("axis", MESH.axes)
def test_a_permutation_sends_its_array_once_over_the_axis(axis):
    def swap(x):
        return lax.ppermute(x, axis, [(0, 1), (1, 0)])

    ((compiled, result),) = in_hlo(lifted(swap, abstract=False), X)
    assert compiled == "collective-permute"
    want = by_pairs((axis,), result)
    assert tiers_of(trace(lifted(swap, abstract=True), X)) == want


@pytest.mark.parametrize("quantize", [False, True])
def test_dispatch_and_combine_send_what_the_compiled_program_sends(quantize):
    tokens, copies, hidden, slots, capacity = 6, 4, 1024, 2, 3
    options = {
        "axes": MESH.axes,
        "ranks": MESH.ranks,
        "slots_per_rank": slots,
        "capacity": capacity,
    }

    def layer(x, where, weights):
        sent = dispatch(x, where, quantize=quantize, **options)
        rows = sent.rows.astype(F32) * sent.scale[..., None]
        return combine(rows, where, sent.position, weights, **options)

    args = (
        jax.ShapeDtypeStruct((MESH.ranks, tokens, hidden), F32),
        jax.ShapeDtypeStruct((MESH.ranks, tokens, copies), jnp.int32),
        jax.ShapeDtypeStruct((MESH.ranks, tokens, copies), F32),
    )
    program = trace(lifted(layer, 3, abstract=True), *args)
    traffic = {op.name: op.work for op in program.operations if op.work.reach >= 0}
    assert set(traffic) == {"cm_dispatch", "cm_combine"}

    compiled = in_hlo(lifted(layer, 3, abstract=False), *args)
    assert {name for name, _ in compiled} == {"all-to-all"}
    blocks = MESH.ranks * slots * capacity
    wide = blocks * hidden * 4
    rest = [result for _, result in compiled if result != wide]
    wide_messages = len(compiled) - len(rest)
    # Beside the rows, the quantized dispatch sends them as INT8, and one scale a row.
    assert wide_messages == (1 if quantize else 2)
    assert sorted(rest) == (sorted([blocks * hidden, blocks * 4]) if quantize else [])

    # A fused operator's message is a row with 44 bytes of metadata in whole 512-byte blocks.
    message = 512 * math.ceil((hidden + 44) / 512) if quantize else hidden * 4
    for name, row in (("cm_dispatch", message), ("cm_combine", hidden * 4)):
        want = by_pairs(MESH.axes, slots * capacity * row)
        assert {t: traffic[name].column(t).constant for t in TIERS} == pytest.approx(want)
    assert traffic["cm_dispatch"].flags == MESH.ranks


@pytest.mark.parametrize("nodes, copies", [(2, 1), (2, 8), (4, 3), (48, 8)])
def test_a_token_crosses_to_a_node_once_however_many_of_its_experts_are_there(nodes, copies):
    mesh = RankMesh(nodes, 8, 2)
    tokens, hidden, capacity = 8, 128, 16
    program = trace(
        lambda x, s: (
            dispatch(
                x, s, axes=mesh.axes, ranks=mesh.ranks, slots_per_rank=1, capacity=capacity
            ).rows
        ),
        jax.ShapeDtypeStruct((tokens, hidden), F32),
        jax.ShapeDtypeStruct((tokens, copies), jnp.int32),
        axis_sizes=dict(zip(mesh.axes, mesh.shape, strict=True)),
    )
    totals = program.totals({})
    # Of all the nodes**copies ways to spread a token's copies, the mean number of other nodes hit.
    other = (nodes - 1) * (1 - (1 - 1 / nodes) ** copies)
    if nodes**copies <= 256:
        ways = list(itertools.product(range(nodes), repeat=copies))
        assert other == pytest.approx(sum(len(set(w) - {0}) for w in ways) / len(ways), rel=1e-12)
    rows_sent = copies * (nodes - 1) / nodes
    want = totals["supernode_bytes"] * other / rows_sent
    assert totals["once_per_node_bytes"] == pytest.approx(want, rel=1e-12)
    assert totals["once_per_node_bytes"] <= totals["supernode_bytes"] * (1 + 1e-12)


@pytest.mark.parametrize("shape", [(48, 8, 2), (1, 8, 2), (4, 8, 1), (1, 1, 2)])
def test_shares_of_tiers_count_ranks_at_any_size(shape):
    mesh = RankMesh(*shape)
    sizes = dict(zip(mesh.axes, mesh.shape, strict=True))
    ranks, *shares = tier_shares(mesh.axes, sizes)
    assert ranks == mesh.ranks
    nodes, npus, dies = shape
    counts = [dies - 1, (npus - 1) * dies, (nodes - 1) * npus * dies]
    assert [s * ranks for s in shares] == pytest.approx(counts)
    assert sum(shares) == pytest.approx(1 - 1 / ranks)


def test_a_group_of_one_rank_sends_nothing_and_starts_nothing():
    fields = exchange(Size(1000), ("node", "npu"), {"node": 1, "npu": 1, "die": 2})
    assert all(fields[t] == 0 for t in TIERS)
    assert fields["launches"] == 0 and fields["reach"] == -1


@pytest.mark.parametrize(
    "names, message",
    [
        (
            "rows",
            "collective over mesh axis 'rows': the fabric knows 'node', 'npu' and 'die'; say where "
            "this one lies, such as tiers={'rows': 'node'}, or give a machine",
        ),
        (("node", "die"), "collective over mesh axis 'die', which no shard_map defines"),
    ],
)
def test_an_axis_that_is_no_part_of_the_fabric_is_refused(names, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tier_shares(names, {"node": 2, "npu": 8, "rows": 4})


def test_a_collective_inside_a_scan_is_charged_every_iteration():
    def steps(x):
        return lax.scan(lambda x, _: (lax.psum(x, "npu") * 0.5, None), x, length=7)[0]

    once = trace(lifted(lambda x: lax.psum(x, "npu") * 0.5, abstract=True), X)
    program = trace(on_every_rank(steps, MESH, (RANKED,), RANKED, abstract=True), X)
    assert program.totals({})["node_bytes"] == 7 * once.totals({})["node_bytes"] > 0
