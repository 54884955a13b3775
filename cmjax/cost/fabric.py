"""How long moving bytes between ranks takes: latency and bandwidth per tier (Hockney's model).

    t_collective = startup + latency(furthest tier) + wire
    t_dispatch   = dispatch_startup + latency + max(wire, chain)
                   + flags * flag_s / cores + local bytes / HBM
    wire         = max(die / B_die, (node / B_node + supernode / B_supernode)) / (eta * saturation)
    chain        = sum over copies (copy_s + latency(tier) + message * saturation_cores / B_node)
                   / (cores of the die * saturation)

Traffic to the own node and to other nodes leaves a die through the same Unified Bus links, so the
two add; where they are separate networks (NVLink and RDMA) the larger counts. `eta` is the share
of the point-to-point bandwidth that an all-to-all reaches, also taken for other collectives; it is
lower for the bytes that overflow the receiver's L2, as they cross HBM twice.

Dispatch and combine are the fused operators of the CloudMatrix384 paper, section 4.2, and of the
open kernels `moe_distribute_dispatch_v2` and `combine_v2`: the copies of tokens are divided over
the vector cores of the stream, and a core reads, quantizes and writes one after the other into
remote memory, waiting for each. So their time is the longer of that chain and of the links, and
what is fixed is only the rest: launch, barriers, flags, reordering. What a copy takes is known with
all cores at work, of which those beyond `saturation_cores` only queue: 24 of 48 reach 95 % of the
bandwidth (StrataCL, arXiv 2607.26444), and 48 gain almost nothing over 24 (UBEP, arXiv 2607.06202).
So a stream with 16 of them sends at two thirds of the die's rate, and not at one third.
Kernels for messages beyond L2 ("normal" ones) do not wait for a copy before they start the next, so
that the links are left, and their dispatch goes through its source ranks one by one
(`bulk_source_s`).
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cmjax.hardware import TIERS, Supernode

Work = Mapping[str, Float[Array, "*operations"]]
"""Work of every operation of a level, by field; a number for all where no operation has any."""


def exchange_s(work: Work, static, machine: Supernode):
    """Wire time, and the time that overlaps with nothing, of every operation of a level.

    Args:
      work: of every operation.
      static: per-operation constants (`engines._Static`).
    Returns: (wire, chain, fixed, disturbing, held), each [operations], zero for compute kernels:
      seconds of moving bytes, of sending copies one by one, of what overlaps with neither, and of
      the part that slows kernels beside it, which is how long it moves bytes, whatever limits
      that; then the share of it that goes by kernels which hold cores of their own.
    """
    tiers, exchange = machine.fabric, machine.exchange
    fused = np.isin(static.kind, ["dispatch", "combine"])
    cores = jnp.minimum(static.vector_cores / exchange.saturation_cores, 1.0)
    cores = jnp.where(fused, cores, 1.0)  # plain collectives are moved by DMA engines

    die, node, far = work["die_bytes"], work["node_bytes"], work["supernode_bytes"]
    received = die + node + far
    spilled = overflow(received, machine)
    if exchange.bulk_kernels:  # by which what spills goes
        once = work["once_per_node_bytes"]
        far = jnp.where(fused, (1 - spilled) * far + spilled * once, far)
    near = die / tiers.die.bandwidth_bytes_per_s
    node = node / tiers.node.bandwidth_bytes_per_s
    far = far / tiers.supernode.bandwidth_bytes_per_s
    apart = node + far if tiers.shared_ports else jnp.maximum(node, far)
    dispatches = static.kind == "dispatch"
    slow = jnp.where(dispatches, exchange.bandwidth, exchange.bandwidth_from_hbm)
    rate = (1 - spilled) / exchange.bandwidth + spilled / slow
    wire = jnp.maximum(near, apart) * rate / cores
    held = jnp.broadcast_to(spilled * exchange.bulk_kernels, wire.shape)
    disturbing = wire * spilled if exchange.bulk_kernels else wire

    latencies = jnp.stack(
        [jnp.asarray(t.latency_s, wire.dtype) for t in (tiers.die, tiers.node, tiers.supernode)]
    )
    latency = jnp.where(static.reach >= 0, latencies[np.maximum(static.reach, 0)], 0.0)
    startup = jnp.where(dispatches, exchange.dispatch_startup_s, 0.0)
    startup = startup + jnp.where(static.kind == "combine", exchange.combine_startup_s, 0.0)
    flags = work["flags"] * (
        exchange.flag_s / static.vector_cores + spilled * exchange.bulk_source_s
    )
    hbm_rate = machine.chip.hbm_bytes_per_s * machine.efficiency.hbm
    local = work["local_bytes"] / hbm_rate
    fixed = latency + startup + flags + local
    if exchange.copies_in_flight or not fused.any():
        return wire, jnp.zeros_like(wire), fixed, disturbing, held
    chain = _chain_s(work, static, machine, spilled)
    return wire, chain, fixed, jnp.maximum(disturbing, chain), held


def overflow(received_bytes, machine: Supernode):
    """The share of what a rank receives that does not fit its L2.

    Receive windows are double-buffered, so two of them pass through L2 in turn; once they are twice
    its size, nothing of them is left there when it is read.
    """
    return jnp.clip(2.0 * received_bytes / machine.chip.l2_bytes - 1.0, 0.0, 1.0)


def _chain_s(work, static, machine: Supernode, spilled):
    """Seconds of the copies that one vector core sends, one after another."""
    exchange = machine.exchange
    tiers = machine.fabric
    latencies = sum(
        work[f"{name}_copies"] * tier.latency_s
        for name, tier in zip(TIERS, (tiers.die, tiers.node, tiers.supernode), strict=True)
    )
    # One core's share of the links; further away the latency grows, not the time to issue.
    moved = work["copy_bytes"] * exchange.saturation_cores / tiers.node.bandwidth_bytes_per_s
    own = work["copies"] * machine.running().copy_s
    saturation = jnp.minimum(static.vector_cores / exchange.saturation_cores, 1.0)
    sent_at_once = machine.chip.vector_cores * saturation
    return (1 - spilled) * (own + latencies + moved) / sent_at_once
