"""Seconds on the wire against hand-written arithmetic, tier by tier and machine by machine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cmjax.cost import price
from cmjax.cost.fabric import exchange_s
from cmjax.hardware import load_machine, replace_leaf
from cmjax.program import FIELDS, trace

CM, H800 = load_machine("cloudmatrix384"), load_machine("h800-pod")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@dataclasses.dataclass(frozen=True)
class Static:
    """What `exchange_s` needs to know of operations beside their work."""

    kind: np.ndarray
    vector_cores: np.ndarray
    reach: np.ndarray


def timed(machine, kind="collective", cores=1e9, reach=-1, **work):
    """(wire, chain, fixed, disturbing, held) of one operation."""
    table = dict.fromkeys(FIELDS, jnp.zeros(())) | {k: jnp.array([v]) for k, v in work.items()}
    static = Static(np.array([kind]), np.array([float(cores)]), np.array([reach]))
    return tuple(float(x[0]) for x in exchange_s(table, static, machine))


def small(machine):
    """Bytes of which twice as many fit the L2, so that none spill."""
    return machine.chip.l2_bytes / 4


@pytest.mark.parametrize("machine", [CM, H800], ids=lambda m: m.name)
@pytest.mark.parametrize("tier", ["die", "node", "supernode"])
def test_bytes_take_their_tiers_bandwidth(machine, tier):
    nbytes = small(machine)
    rate = getattr(machine.fabric, tier).bandwidth_bytes_per_s * machine.exchange.bandwidth
    assert timed(machine, **{f"{tier}_bytes": nbytes})[0] == pytest.approx(nbytes / rate)


def test_shared_ports_add_and_separate_networks_take_the_longer():
    for machine in (CM, H800):
        nbytes = small(machine) / 3
        both = {"node_bytes": nbytes, "supernode_bytes": nbytes}
        each = [timed(machine, **{name: amount})[0] for name, amount in both.items()]
        want = sum(each) if machine.fabric.shared_ports else max(each)
        assert timed(machine, **both)[0] == pytest.approx(want)
    assert CM.fabric.shared_ports and not H800.fabric.shared_ports


def test_the_own_npus_other_die_is_reached_beside_everything_else():
    nbytes = small(CM) / 3
    near, far = timed(CM, die_bytes=nbytes)[0], timed(CM, supernode_bytes=nbytes)[0]
    assert timed(CM, die_bytes=nbytes, supernode_bytes=nbytes)[0] == pytest.approx(max(near, far))


@pytest.mark.parametrize("share, spilled", [(0.5, 0.0), (0.75, 0.5), (1.0, 1.0), (3.0, 1.0)])
def test_what_overflows_the_l2_crosses_hbm(share, spilled):
    nbytes = share * CM.chip.l2_bytes
    exchange = CM.exchange
    slowness = (1 - spilled) / exchange.bandwidth + spilled / exchange.bandwidth_from_hbm
    rate = CM.fabric.supernode.bandwidth_bytes_per_s
    assert timed(CM, supernode_bytes=nbytes)[0] == pytest.approx(nbytes / rate * slowness)


@pytest.mark.parametrize("kind", ["dispatch", "combine"])
def test_few_vector_cores_send_a_fused_exchange_slower(kind):
    enough, nbytes = CM.exchange.saturation_cores, small(CM)
    fast = timed(CM, kind, cores=enough, supernode_bytes=nbytes)[0]
    assert timed(CM, kind, cores=2 * enough, supernode_bytes=nbytes)[0] == fast
    assert timed(CM, kind, cores=enough / 4, supernode_bytes=nbytes)[0] == pytest.approx(4 * fast)
    # A plain collective is moved by DMA engines.
    assert timed(CM, cores=1, supernode_bytes=nbytes)[0] == pytest.approx(fast)


@pytest.mark.parametrize("reach, tier", [(0, "die"), (1, "node"), (2, "supernode")])
def test_an_exchange_waits_for_the_latency_of_its_furthest_tier(reach, tier):
    assert timed(CM, reach=reach)[2] == pytest.approx(getattr(CM.fabric, tier).latency_s)
    assert timed(CM, reach=-1)[2] == 0.0


def test_a_fused_exchange_waits_for_its_startup_its_flags_and_its_own_reads():
    ranks, nbytes, cores = 320, 1e6, 16.0
    latency = CM.fabric.supernode.latency_s
    flags = ranks * CM.exchange.flag_s / cores
    dispatch = timed(CM, "dispatch", cores=cores, reach=2, flags=ranks)[2]
    assert dispatch == pytest.approx(latency + CM.exchange.dispatch_startup_s + flags)
    local = nbytes / (CM.chip.hbm_bytes_per_s * CM.efficiency.hbm)
    combine = timed(CM, "combine", cores=cores, reach=2, local_bytes=nbytes)[2]
    assert combine == pytest.approx(latency + CM.exchange.combine_startup_s + local)


@pytest.mark.parametrize("kind", ["dispatch", "combine"])
def test_a_vector_core_sends_its_copies_one_after_another(kind):
    copies, message, cores = 96, 7680, 48
    tiers = {"die": 6, "node": 30, "supernode": 54}  # the other six stay on the die
    fabric, exchange = CM.fabric, CM.exchange
    waits = sum(n * getattr(fabric, tier).latency_s for tier, n in tiers.items())
    rate = fabric.node.bandwidth_bytes_per_s / exchange.saturation_cores
    want = (waits + copies * (CM.running().copy_s + message / rate)) / cores
    sent = {f"{tier}_copies": n for tier, n in tiers.items()}
    work = {"copies": copies, "copy_bytes": copies * message, **sent}
    assert timed(CM, kind, cores=cores, **work)[1] == pytest.approx(want)
    # Those beyond what saturates the links only queue; fewer send in proportion.
    enough = exchange.saturation_cores
    assert timed(CM, kind, cores=enough, **work)[1] == pytest.approx(want)
    assert timed(CM, kind, cores=16, **work)[1] == pytest.approx(want * enough / 16)
    # Few bytes that are sent slowly are on their way, and disturb who computes, all that time.
    assert timed(CM, kind, cores=cores, **work)[3] == pytest.approx(want)
    # Kernels for what does not fit L2 have copies in flight, as GPUs always do.
    bulk = {"supernode_bytes": 2 * CM.chip.l2_bytes}
    assert timed(CM, kind, cores=cores, **work, **bulk)[1] == 0.0
    assert timed(H800, kind, cores=cores, **work)[1] == 0.0


def test_a_bulk_dispatch_goes_through_its_source_ranks_one_by_one():
    nbytes = 2 * CM.chip.l2_bytes
    few, many = (timed(CM, "dispatch", supernode_bytes=nbytes, flags=r)[2] for r in (32, 128))
    assert many - few == pytest.approx(96 * (CM.exchange.bulk_source_s + CM.exchange.flag_s / 1e9))


def test_the_kernels_of_a_serving_engine_take_their_own_time_for_a_copy():
    slow = CM.under("sglang-ascend")
    work = {"copies": 48.0, "copy_bytes": 1.0}
    more = timed(slow, "dispatch", cores=48, **work)[1] - timed(CM, "dispatch", cores=48, **work)[1]
    assert more == pytest.approx(slow.running().copy_s - CM.running().copy_s)
    assert more > 0


def test_bulk_kernels_send_a_token_to_a_node_once():
    assert H800.exchange.bulk_kernels and not CM.exchange.bulk_kernels
    nbytes, once = 10 * H800.chip.l2_bytes, 2 * H800.chip.l2_bytes
    work = {"supernode_bytes": nbytes, "once_per_node_bytes": once}
    rate = H800.fabric.supernode.bandwidth_bytes_per_s
    for kind, share in (("dispatch", "bandwidth"), ("combine", "bandwidth_from_hbm")):
        want = once / (rate * getattr(H800.exchange, share))
        assert timed(H800, kind, **work)[0] == pytest.approx(want)
    few = {"supernode_bytes": small(H800), "once_per_node_bytes": 1.0}
    low_latency = timed(H800, "dispatch", **few)
    assert low_latency[0] > 1e3 * timed(H800, "dispatch", supernode_bytes=1.0)[0]
    assert low_latency[3] == 0.0  # those kernels hold no cores
    assert timed(H800, "dispatch", **work)[3] > 0


def test_bulk_kernels_take_over_from_the_others_as_l2_overflows():
    l2, exchange = H800.chip.l2_bytes, H800.exchange
    rate = H800.fabric.supernode.bandwidth_bytes_per_s

    def combined(share_of_l2):
        nbytes = share_of_l2 * l2
        work = {"supernode_bytes": nbytes, "once_per_node_bytes": 0.4 * nbytes}
        return timed(H800, "combine", **work)

    # of 3/4 of L2, twice in turn, a half does not fit: it crosses to a node once, and from HBM
    each = 0.5 / exchange.bandwidth + 0.5 / exchange.bandwidth_from_hbm
    wire, _, _, disturbing, held = combined(0.75)
    assert wire == pytest.approx(0.75 * l2 * (0.5 + 0.5 * 0.4) / rate * each)
    assert disturbing == pytest.approx(wire / 2)
    assert held == pytest.approx(0.5)  # of its time such kernels hold cores
    below, above = combined(0.4999), combined(0.5001)
    assert above[0] == pytest.approx(below[0], rel=1e-3)
    assert above[3] == pytest.approx(below[3], abs=1e-3 * above[0])


def test_a_kernel_that_stays_on_its_die_spends_nothing_here():
    assert timed(CM, "compute", read_bytes=1e9, flops=1e12) == (0.0,) * 5


def test_a_priced_all_reduce_is_two_shares_to_every_peer():
    ranks, shape = 16, (64, 512)
    program = trace(
        lambda x: lax.psum(x, ("npu", "die")),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        axis_sizes={"npu": 8, "die": 2},
    )
    nbytes = 4 * 64 * 512
    near = 2 * nbytes / ranks / CM.fabric.die.bandwidth_bytes_per_s
    node = 2 * nbytes * (ranks - 2) / ranks / CM.fabric.node.bandwidth_bytes_per_s
    wire = max(near, node) / CM.exchange.bandwidth
    want = wire + CM.fabric.node.latency_s + CM.chip.collective_startup_s
    vector = nbytes / CM.chip.vector_bytes_per_s
    hbm = 2 * nbytes / (CM.chip.hbm_bytes_per_s * CM.efficiency.hbm)
    assert max(vector, hbm) < wire
    assert float(price(program, CM, {}).total_s) == pytest.approx(want, rel=1e-9)
    faster = replace_leaf(CM, "fabric.node.bandwidth_bytes_per_s", 1e15)
    assert float(price(program, faster, {}).total_s) < want
