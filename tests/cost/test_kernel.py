"""Time of one kernel and of one exchange, by hand."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cmjax.cost import price
from cmjax.cost.engines import PIPELINE_TILES, largest
from cmjax.cost.micro import MICROS, micro
from cmjax.cost.ranks import mesh_for, mesh_spread
from cmjax.hardware import load_machine, replace_leaf
from cmjax.primitives import attention
from cmjax.primitives.grouped import stacked_dot
from cmjax.program import fused, stream, trace

M = load_machine("cloudmatrix384")
CHIP, EFFICIENCY = M.chip, M.efficiency
HBM = CHIP.hbm_bytes_per_s * EFFICIENCY.hbm
BF16 = jnp.bfloat16


def array(*shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def time_of(fn, *args, machine=M, **axis_sizes):
    return float(price(trace(fn, *args, axis_sizes=axis_sizes), machine, {}).total_s)


@pytest.mark.parametrize(
    "dtype, peak, m",
    [
        ("int8", CHIP.cube_flops_8bit, 4096),  # cube-bound
        ("int8", CHIP.cube_flops_8bit, 16),  # HBM-bound
        ("bfloat16", CHIP.cube_flops_16bit, 4096),
        ("bfloat16", CHIP.cube_flops_16bit, 16),
        ("float32", CHIP.cube_flops_32bit, 4096),
    ],
)
def test_a_matrix_product_takes_its_slower_engine_and_a_start(dtype, peak, m):
    k, n = 7168, 2048
    dtype = jnp.dtype(dtype)
    out = jnp.dtype("int32" if dtype == jnp.int8 else dtype)

    def product(x, w):
        return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=out)

    cube = 2 * m * k * n / (peak * EFFICIENCY.gemm)
    hbm = ((m * k + k * n) * dtype.itemsize + m * n * out.itemsize) / HBM
    assert (cube > hbm) == (m == 4096)
    got = time_of(product, array(m, k, dtype=dtype), array(k, n, dtype=dtype))
    assert got == pytest.approx(CHIP.matrix_startup_s + max(cube, hbm), rel=1e-12)


@pytest.mark.parametrize(
    "m, k, n, longest",
    [(4096, 7168, 36864, "cube"), (64, 7168, 36864, "hbm"), (64, 65536, 128, "inner")],
)
def test_of_a_matrix_product_a_share_of_what_the_longest_part_could_hide_is_exposed(
    m, k, n, longest
):
    machine = load_machine("h800-pod")
    chip, efficiency = machine.chip, machine.efficiency
    parts = {
        "cube": 2 * m * k * n / (chip.cube_flops_8bit * efficiency.gemm),
        "hbm": (m * k + k * n + 4 * m * n) / (chip.hbm_bytes_per_s * efficiency.hbm),
        "inner": k / 128 * chip.inner_block_s,
    }
    assert max(parts, key=parts.get) == longest
    rest = sum(parts.values()) - parts[longest]
    want = chip.matrix_startup_s + parts[longest] + efficiency.exposed * rest
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.int32)
    x, w = array(m, k, dtype=jnp.int8), array(k, n, dtype=jnp.int8)
    assert time_of(product, x, w, machine=machine) == pytest.approx(want, rel=1e-12)


def test_an_inner_block_is_as_many_numbers_of_every_width():
    machine = replace_leaf(M, "chip.inner_block_s", 1.0)
    for dtype in ("int8", "bfloat16", "float32"):
        x, w = array(16, 3 * 128, dtype=dtype), array(3 * 128, 16, dtype=dtype)
        assert time_of(lambda x, w: x @ w, x, w, machine=machine) == pytest.approx(3.0, rel=1e-4)


@pytest.mark.parametrize("groups, kind", [(1, "gemm"), (8, "grouped")])
def test_products_of_a_stack_have_an_efficiency_of_their_own(groups, kind):
    slower = replace_leaf(M, "efficiency.grouped", 0.5)
    peak = CHIP.cube_flops_8bit * getattr(slower.efficiency, kind)
    m = k = n = 8192
    found = micro("gemm", slower, groups=groups, m=m, k=k, n=n).measure(slower)
    cube, vector = 2 * groups * m * k * n / peak, groups * m * n * 4 / CHIP.vector_bytes_per_s
    want = CHIP.matrix_startup_s + cube + vector / PIPELINE_TILES
    assert float(found["us"]) == pytest.approx(want * 1e6, rel=1e-9)


@pytest.mark.parametrize("heads, longest", [(512, "cube"), (16, "hbm")])
def test_of_attention_a_share_of_its_own_is_exposed(heads, longest):
    machine = load_machine("h800-pod")
    chip, efficiency = machine.chip, machine.efficiency
    batch, context, kv_heads, d = 64, 8192, 2, 128
    cube = 4 * batch * heads * context * d / (chip.cube_flops_16bit * efficiency.attention)
    vector = batch * heads * context * 9 * 4 / chip.vector_bytes_per_s
    moved = 2 * batch * d * (2 * context * kv_heads + 2 * heads)  # and the lengths
    hbm = moved / (chip.hbm_bytes_per_s * efficiency.hbm)
    shorter, longer = sorted((cube, hbm))
    assert longer == {"cube": cube, "hbm": hbm}[longest]
    want = chip.attention_startup_s + longer + efficiency.attention_exposed * shorter
    want += min(cube, vector) / PIPELINE_TILES
    options = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "context": context, "d": d}
    got = float(micro("decode-attention", machine, **options).measure(machine)["us"])
    assert got == pytest.approx(want * 1e6, rel=1e-4)  # the last key is seen by half


@pytest.mark.parametrize("rows", [0.02, 0.5, 8])
def test_of_a_stack_of_experts_those_without_a_row_are_not_read(rows):
    # rows of an expert are a symbol, as in a step that is priced
    (r,) = jax.export.symbolic_shape("rows")
    slots, k, n = 32, 2048, 1536
    program = trace(stacked_dot, array(slots, r, k), array(slots, k, n))
    got = float(price(program, M, {"rows": rows}).total_s)
    # each of many independent rows falls on one of the slots
    many = 10**6
    read = 1 - (1 - rows / many) ** many
    moved = 2 * (slots * rows * (k + n) + slots * k * n * read)
    assert got == pytest.approx(moved / HBM + CHIP.matrix_startup_s, rel=1e-4)


def test_an_elementwise_kernel_takes_hbm_or_its_instructions():
    n = 1 << 24
    exp = 4  # instructions
    for repeats in (1, 60):

        def chain(x, repeats=repeats):
            for _ in range(repeats):
                x = jnp.exp(x)
            return x

        hbm = 2 * n * 2 / HBM
        vector = repeats * exp * n * 2 / CHIP.vector_bytes_per_s
        assert (vector > hbm) == (repeats == 60)
        want = CHIP.vector_startup_s + max(hbm, vector)
        assert time_of(chain, array(n)) == pytest.approx(want, rel=1e-12)


def test_one_tile_of_the_hand_over_between_cube_and_vector_is_exposed():
    m = n = k = 4096

    @fused("product and activation")
    def kernel(x, w):
        return jnp.exp(x @ w)

    cube = 2 * m * n * k / (CHIP.cube_flops_16bit * EFFICIENCY.gemm)
    vector = 4 * m * n * 2 / CHIP.vector_bytes_per_s
    hbm = 2 * 3 * n * n / HBM
    want = max(cube, vector, hbm) + min(cube, vector) / PIPELINE_TILES + CHIP.matrix_startup_s
    timeline = price(trace(kernel, array(m, k), array(k, n)), M, {})
    assert float(timeline.total_s) == pytest.approx(want, rel=1e-12)
    engines = {name: float(s) for name, s in timeline.engines.items()}
    want = {"cube": cube, "vector": vector, "hbm": hbm, "fabric": 0.0}
    assert engines == pytest.approx(want, rel=1e-12)


def test_a_stream_that_owns_some_cores_computes_at_their_share():
    m = k = n = 4096

    def product(x, w):
        with stream("attention", cube=16, vector=32):
            return x @ w

    def activation(x):
        with stream("attention", cube=16, vector=32):
            for _ in range(60):
                x = jnp.exp(x)
            return x

    startup = CHIP.matrix_startup_s
    cube = time_of(product, array(m, k), array(k, n)) - startup
    full = time_of(lambda x, w: x @ w, array(m, k), array(k, n)) - startup
    assert cube == pytest.approx(full * 24 / 16, rel=1e-12)
    vector = time_of(activation, array(m, n)) - CHIP.vector_startup_s
    assert vector == pytest.approx(60 * 4 * m * n * 2 / (CHIP.vector_bytes_per_s * 32 / 48))
    # Two thirds of the cores that work for so long are two thirds of the engine's time.
    shared = price(trace(product, array(m, k), array(k, n)), M, {}).engines["cube"]
    alone = price(trace(lambda x, w: x @ w, array(m, k), array(k, n)), M, {}).engines["cube"]
    assert float(shared) == pytest.approx(float(alone), rel=1e-12)


@pytest.mark.parametrize("name, cores, most", [("cube", 25, 24), ("vector", 49, 48)])
def test_a_stream_cannot_own_more_cores_than_the_chip_has(name, cores, most):
    def fn(x):
        with stream("greedy", **{name: cores}):
            return jnp.exp(x)

    message = f"stream 'greedy' asks for {cores} {name} cores; the chip has {most}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        time_of(fn, array(8))


def test_attention_runs_at_the_efficiency_of_attention():
    b, length, h, d = 4, 4096, 32, 128
    q = array(b, length, h, d)
    machine = replace_leaf(M, "chip.attention_startup_s", 7e-6)

    def kernel(q, k, v):
        return attention(q, k, v, scale=1.0, causal=True)

    got = time_of(kernel, q, q, q, machine=machine)
    scores = b * h * length * length / 2
    cube = 2 * scores * 2 * d / (CHIP.cube_flops_16bit * EFFICIENCY.attention)
    vector = scores * 4 * 9 / CHIP.vector_bytes_per_s
    hbm = 4 * b * length * h * d * 2 / HBM
    want = max(cube, vector, hbm) + min(cube, vector) / PIPELINE_TILES + 7e-6
    assert got == pytest.approx(want, rel=1e-12)


def test_a_chain_takes_the_sum_of_its_kernels():
    x, w = array(1024, 1024), array(1024, 1024)
    product = time_of(lambda x, w: x @ w, x, w)
    activation = time_of(jnp.exp, x)
    assert time_of(lambda x, w: jnp.exp(x @ w) @ w, x, w) == pytest.approx(
        2 * product + activation, rel=1e-12
    )


SIZES = {"node": 4, "npu": 8, "die": 2}


@pytest.mark.parametrize("machine", ["cloudmatrix384", "h800-pod"])
@pytest.mark.parametrize("axes", [("die",), ("npu", "die"), ("node",), ("node", "npu", "die")])
def test_an_all_to_all_takes_latency_of_its_furthest_tier_and_bytes_on_its_links(machine, axes):
    machine = load_machine(machine)
    rows, width = 4096, 256
    nbytes = rows * width * 2
    ranks = int(np.prod([SIZES[a] for a in axes]))
    dies = SIZES["die"] if "die" in axes else 1
    local = dies * (SIZES["npu"] if "npu" in axes else 1)
    fabric = machine.fabric
    die = nbytes * (dies - 1) / ranks / fabric.die.bandwidth_bytes_per_s
    node = nbytes * (local - dies) / ranks / fabric.node.bandwidth_bytes_per_s
    far = nbytes * (ranks - local) / ranks / fabric.supernode.bandwidth_bytes_per_s
    both = node + far if fabric.shared_ports else max(node, far)
    furthest = fabric.supernode if "node" in axes else fabric.node if "npu" in axes else fabric.die
    want = (
        machine.chip.collective_startup_s
        + furthest.latency_s
        + max(die, both) / machine.exchange.bandwidth
    )
    got = time_of(
        lambda x: lax.all_to_all(x, axes, 0, 0, tiled=True),
        array(rows, width),
        machine=machine,
        **SIZES,
    )
    assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("tokens", [128, 2500, 8192])
def test_a_dispatch_takes_its_copies_in_turn_until_they_overflow_the_receivers_l2(tokens):
    ep, copies, message = 16, 8, 7680
    peers = {"die": 1, "node": 14}
    rows_to_a_peer = tokens * copies / ep
    sent = {tier: n * rows_to_a_peer * message for tier, n in peers.items()}
    received = sum(sent.values())
    spilled = min(max(2 * received / CHIP.l2_bytes - 1, 0), 1)
    assert (spilled > 0) == (tokens > 128) and (spilled < 1) == (tokens < 8192)
    wire = (
        max(
            sent["die"] / M.fabric.die.bandwidth_bytes_per_s,
            sent["node"] / M.fabric.node.bandwidth_bytes_per_s,
        )
        / M.exchange.bandwidth
    )
    issued = (
        tokens
        * copies
        * (
            M.running().copy_s
            + message * M.exchange.saturation_cores / M.fabric.node.bandwidth_bytes_per_s
        )
    )
    waits = rows_to_a_peer * (M.fabric.die.latency_s + 14 * M.fabric.node.latency_s)
    chain = (1 - spilled) * (issued + waits) / CHIP.vector_cores
    fixed = M.fabric.node.latency_s + M.exchange.dispatch_startup_s
    fixed += ep * (M.exchange.flag_s / CHIP.vector_cores + spilled * M.exchange.bulk_source_s)
    fixed += 2 * tokens * copies * message / HBM  # what arrived is copied into contiguous rows
    result = micro("dispatch", M, ep=ep, tokens=tokens).measure(M)
    assert float(result["us"]) == pytest.approx((max(wire, chain) + fixed) * 1e6, rel=1e-12)


def test_few_vector_cores_send_slower_and_count_flags_slower():
    flags = replace_leaf(M, "exchange.flag_s", 1e-6)
    few = replace_leaf(flags, "exchange.saturation_cores", 48.0)  # a core has 1/48 of the links

    def us(machine):
        return float(micro("dispatch", M, ep=16, tokens=128).measure(machine)["us"])

    more = 48 - M.exchange.saturation_cores
    chain = 128 * 8 / 48 * 7680 * more / M.fabric.node.bandwidth_bytes_per_s
    assert us(flags) - us(M) == pytest.approx(16 / 48, rel=1e-6)
    assert us(few) - us(flags) == pytest.approx(chain * 1e6, rel=1e-6)


def test_micro_benchmarks_report_consistent_results():
    gemm = micro("gemm", M, m=4096, k=7168, n=2048).measure(M)
    seconds = float(gemm["us"]) / 1e6
    assert float(gemm["tflops"]) == pytest.approx(2 * 4096 * 7168 * 2048 / 1e12 / seconds)
    assert float(gemm["utilization"]) == pytest.approx(
        float(gemm["tflops"]) * 1e12 / CHIP.cube_flops_8bit
    )
    assert 0 < float(gemm["utilization"]) < EFFICIENCY.gemm
    bf16 = micro("gemm", M, m=4096, k=7168, n=2048, quant="bf16").measure(M)
    assert float(bf16["us"]) > float(gemm["us"])
    cache = dict(batch=96, q_len=2, heads=128, context=4096)
    latent = micro("latent-attention", M, **cache).measure(M)
    kv = 96 * 4096 * (512 + 64) * 2
    assert float(latent["gb_per_s"]) == pytest.approx(kv / 1e9 / (float(latent["us"]) / 1e6))


@pytest.mark.parametrize(
    "operator, options, message",
    [
        ("dispach", {}, "unknown operator 'dispach'; closest: dispatch"),
        ("zzz", {}, f"unknown operator 'zzz'; closest: {', '.join(MICROS)}"),
        ("gemm", {"m": 8, "k": 8, "n": 8, "sise": 3}, "operator gemm: "),
        ("gemm", {"m": 8, "k": 8}, "operator gemm: "),
        (
            "gemm",
            {"m": 8, "k": 8, "n": 8, "quant": "int3"},
            "operator gemm: quant must be int8 or bf16",
        ),
        ("dispatch", {"ep": 1000, "tokens": 8}, "1000 ranks; cloudmatrix384 has 768"),
        (
            "dispatch",
            {"ep": 20, "tokens": 8},
            "20 ranks on cloudmatrix384: use a multiple of 2 up to 16, or a multiple of 16",
        ),
    ],
)
def test_a_bad_micro_benchmark_is_refused(operator, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        micro(operator, M, **options)


@pytest.mark.parametrize(
    "ranks, shape", [(2, (1, 1, 2)), (16, (1, 8, 2)), (32, (2, 8, 2)), (768, (48, 8, 2))]
)
def test_ranks_fill_whole_nodes_first(ranks, shape):
    mesh = mesh_for(ranks, M)
    assert (mesh.nodes, mesh.npus, mesh.dies) == shape and mesh.ranks == ranks


@pytest.mark.parametrize(
    "ranks, shape",
    [(16, (1, 8, 2)), (32, (2, 8, 2)), (72, (6, 6, 2)), (40, (4, 5, 2)), (7, (1, 7, 1)),
     (768, (48, 8, 2))],
)  # fmt: skip
def test_any_ranks_spread_over_as_few_nodes_as_hold_them_evenly(ranks, shape):
    mesh = mesh_spread(ranks, M)
    assert (mesh.nodes, mesh.npus, mesh.dies) == shape and mesh.ranks == ranks


@pytest.mark.parametrize(
    "ranks, message",
    [(769, "769 ranks; cloudmatrix384 has 768"), (0, "0 ranks; "), (61, "61 ranks do not spread")],
)
def test_ranks_that_no_nodes_hold_evenly_are_refused(ranks, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        mesh_spread(ranks, M)


def test_the_smooth_maximum_bounds_the_maximum_from_above():
    terms = jnp.array([[1.0, 5.0], [3.0, -2.0], [2.9, 5.0]])
    exact = jnp.max(terms, 0)
    assert (largest(terms, 0.0) == exact).all()
    for temperature in (1.0, 0.1, 0.01):
        excess = largest(terms, temperature) - exact
        # log-sum-exp of n terms exceeds their maximum by at most T ln n.
        assert ((excess > 0) & (excess <= temperature * np.log(3))).all()
