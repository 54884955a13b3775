"""How long moving bytes between ranks takes: latency and bandwidth per tier (Hockney's model).

    t_collective = startup + latency(furthest tier) + wire
    t_dispatch   = t_collective + dispatch_startup + flags * flag_s / cores + local bytes / HBM
    wire         = max(die / B_die, (node / B_node + supernode / B_supernode)) / (eta * saturation)
    1 / eta      = on-chip share / eta_chip + (1 - on-chip share) / eta_hbm

Traffic to the own node and to other nodes leaves a die through the same Unified Bus links, so the
two add; where they are separate networks (NVLink and RDMA) the larger counts. `eta` is the share
of the point-to-point bandwidth that an all-to-all reaches, also taken for other collectives; it is
lower for the bytes that overflow the receiver's L2, as they cross HBM twice. Dispatch
and combine are the fused operators of the CloudMatrix384 paper, section 4.2: vector cores write
straight into remote memory, so few cores send slower (`saturation`).
"""

import jax.numpy as jnp
import numpy as np

from cmjax.hardware import Supernode
from cmjax.program import FIELDS

COLUMN = {name: i for i, name in enumerate(FIELDS)}


def exchange_s(table, static, machine: Supernode):
    """Wire time, and the time that overlaps with nothing, of every operation of a level.

    Args:
      table: work, [operations, len(FIELDS)].
      static: per-operation constants (`engines._Static`).
    Returns: (wire, waiting, disturbing), each [operations] in seconds, zero for compute kernels:
      moving bytes, what overlaps with nothing, and the part that slows kernels beside it.
    """
    tiers, exchange = machine.fabric, machine.exchange
    fused = np.isin(static.kind, ["dispatch", "combine"])
    cores = jnp.minimum(static.vector_cores / exchange.saturation_cores, 1.0)
    cores = jnp.where(fused, cores, 1.0)  # plain collectives are moved by DMA engines

    def column(name):
        return table[:, COLUMN[name]]

    die, node, far = column("die_bytes"), column("node_bytes"), column("supernode_bytes")
    received = die + node + far
    # Receive windows are double-buffered, so two of them pass through L2 in turn; once they are
    # twice its size, nothing of them is left there when it is read.
    spilled = jnp.clip(2.0 * received / machine.chip.l2_bytes - 1.0, 0.0, 1.0)
    if exchange.bulk_kernels:
        far = jnp.where(fused & (spilled > 0), column("once_per_node_bytes"), far)
    near = die / tiers.die.bandwidth_bytes_per_s
    node = node / tiers.node.bandwidth_bytes_per_s
    far = far / tiers.supernode.bandwidth_bytes_per_s
    apart = node + far if tiers.shared_ports else jnp.maximum(node, far)
    rate = (1 - spilled) / exchange.bandwidth + spilled / exchange.bandwidth_from_hbm
    wire = jnp.maximum(near, apart) * rate / cores
    disturbing = wire * jnp.where(spilled > 0, 1.0, 0.0) if exchange.bulk_kernels else wire

    latencies = jnp.stack(
        [jnp.asarray(t.latency_s, wire.dtype) for t in (tiers.die, tiers.node, tiers.supernode)]
    )
    latency = jnp.where(static.reach >= 0, latencies[np.maximum(static.reach, 0)], 0.0)
    startup = jnp.where(static.kind == "dispatch", exchange.dispatch_startup_s, 0.0)
    startup = startup + jnp.where(static.kind == "combine", exchange.combine_startup_s, 0.0)
    flags = table[:, COLUMN["flags"]] * exchange.flag_s / static.vector_cores
    hbm_rate = machine.chip.hbm_bytes_per_s * machine.efficiency.hbm
    local = table[:, COLUMN["local_bytes"]] / hbm_rate
    return wire, latency + startup + flags + local, disturbing
