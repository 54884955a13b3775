"""What a supernode is: dies, the tiers of links between them, and the constants that time them.

Every class is a frozen dataclass registered as a pytree. Float fields are leaves, so `jax.grad`
of a priced time gives its sensitivity to each of them; counts and names are static. All values are
SI and *per die* (one rank) unless the name says otherwise.
"""

import dataclasses
from typing import dataclass_transform

import jax
from jax import Array
from jaxtyping import Float

Scalar = float | Float[Array, ""]

TIERS = ("die", "node", "supernode")
"""Link tiers by distance: other die of the same NPU, other NPU of the node, other node."""


def static(**kwargs):
    """A dataclass field that carries no gradient (a count, a name or a flag)."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def _pytree(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


@_pytree
class Chip:
    """One die: the engines that do arithmetic and the memories that feed them.

    Fields:
      cube_flops_8bit, cube_flops_16bit, cube_flops_32bit: dense matrix peak by operand width,
        all cube cores together [FLOP/s].
      vector_bytes_per_s: operand bytes that all vector cores together take per second; one
        element-wise instruction on n elements of s bytes takes n*s of them.
      hbm_bytes_per_s, hbm_bytes: memory bandwidth and capacity.
      matrix_startup_s, attention_startup_s, vector_startup_s, collective_startup_s: from one
        kernel's end to the next one's first useful cycle on a stream, by what starts: a kernel with
        matrix products, attention (where it takes several kernels, all of them), a kernel of
        neither, a plain collective (dispatch and combine have start-ups of their own).
      inner_block_s: what a matrix product takes for every 128 numbers of its inner dimension,
        however small the tile that a core has of the result.
      l2_bytes: on-chip memory shared by the die's cores.
      cube_cores, vector_cores: AIC and AIV counts (streaming multiprocessors on a GPU).
      separate_vector_cores: True where cube and vector cores are different cores, which streams
        can own; False where every core does both.
    """

    cube_flops_8bit: Scalar
    cube_flops_16bit: Scalar
    cube_flops_32bit: Scalar
    vector_bytes_per_s: Scalar
    hbm_bytes_per_s: Scalar
    hbm_bytes: Scalar
    matrix_startup_s: Scalar
    attention_startup_s: Scalar
    vector_startup_s: Scalar
    collective_startup_s: Scalar
    inner_block_s: Scalar
    l2_bytes: Scalar
    cube_cores: int = static()
    vector_cores: int = static()
    separate_vector_cores: bool = static()


@_pytree
class Tier:
    """One tier of links as a die sees it: one-way bandwidth point to point, and latency."""

    bandwidth_bytes_per_s: Scalar
    latency_s: Scalar


@_pytree
class Fabric:
    """The networks of the machine.

    Fields:
      die, node, supernode: the tiers in `TIERS`, on the scale-up network (Unified Bus).
      rdma, vpc: the scale-out and the management planes.
      shared_ports: True where traffic to the own node and to other nodes leaves through the same
        links (UB), so their times add; False where they are separate networks (NVLink and RDMA).
    """

    die: Tier
    node: Tier
    supernode: Tier
    rdma: Tier
    vpc: Tier
    shared_ports: bool = static()


@_pytree
class Exchange:
    """Constants of the fused expert dispatch and combine operators (`cmjax.cost.fabric`).

    Fields:
      bandwidth: fraction of a tier's point-to-point bandwidth that an all-to-all reaches while
        what a rank receives fits its on-chip L2.
      bandwidth_from_hbm: the same for the part that does not fit (a dispatch pays for it where it
        reorders what arrived).
      dispatch_startup_s, combine_startup_s: fixed time (launch, slot addresses, barriers).
      flag_s: time to count, poll and clear the flags of one source rank, on one vector core.
      bulk_source_s: time that a dispatch too large for L2 takes for every source rank.
      saturation_cores: vector cores that saturate the links; fewer send proportionally slower, and
        more only queue.
      interference: relative slow-down of compute kernels while bytes of an exchange move.
      jitter_s: variance that a rank's arrival time gains per second of work since the ranks last
        met; the standard deviation after a time t is sqrt(jitter_s * t).
      copies_in_flight: True where a core starts a copy before the last one has arrived (GPUs),
        False where it waits for each.
      bulk_kernels: True where large batches have kernels of their own, which send a token to a
        node once and forward it there, hold cores while they do, and leave it to other kernels to
        put rows in the order of experts (DeepEP's normal kernels; its low-latency ones hold none
        and place rows themselves). False where one kind serves all sizes.
    """

    bandwidth: Scalar
    bandwidth_from_hbm: Scalar
    dispatch_startup_s: Scalar
    combine_startup_s: Scalar
    flag_s: Scalar
    bulk_source_s: Scalar
    saturation_cores: Scalar
    interference: Scalar
    jitter_s: Scalar
    copies_in_flight: bool = static()
    bulk_kernels: bool = static()


@_pytree
class Efficiency:
    """What well-written kernels reach; fitted to micro-benchmarks.

    Fields:
      gemm, grouped, attention: fraction of the cube's peak, of a matrix product, of products of a
        stack of matrices (experts), and of attention. hbm: of the memory's.
      exposed, attention_exposed: of matrix products and of attention, the share of the shorter of
        cube and memory time that the longer one does not hide.
    """

    gemm: Scalar
    grouped: Scalar
    attention: Scalar
    hbm: Scalar
    exposed: Scalar
    attention_exposed: Scalar


@_pytree
class Engine:
    """What is of a serving engine, and not of the chip: host time, and its exchange kernels.

    Fields:
      step_s: host time of a step (hand-off of its graph, scheduling, sampling).
      draft_s: host time that each draft adds (acceptance, hand-off of its graph).
      copy_s: of its dispatch and combine kernels, the time that a vector core takes for one copy
        of a token besides moving it: read, quantize, compute the address.
      unfused: names of fused kernels (`cmjax.fused`) that it does not have: what is in them runs in
        kernels of its own, with a start-up each and through HBM.
      prefill_by_heads: whether its prefill divides attention among a few ranks by heads, and all
        else by tokens (SP -> TP -> SP); otherwise every request is one rank's.
    """

    step_s: Scalar
    draft_s: Scalar
    copy_s: Scalar
    unfused: tuple[str, ...] = static(default=())
    prefill_by_heads: bool = static(default=False)
    name: str = static()

    def host_s(self, drafts: Scalar) -> Scalar:
        """Host time of a step with so many drafts a request."""
        return self.step_s + drafts * self.draft_s


@_pytree
class Factors:
    """Time over the model's, by kind of operation: 1, and as uncertain as the model is.

    Fields:
      matrix, attention, vector: kernels with matrix products, attention, all others.
      exchange: dispatch and combine. collective: plain collectives.
      waiting: for the slowest rank.
    """

    matrix: Scalar = 1.0
    attention: Scalar = 1.0
    vector: Scalar = 1.0
    exchange: Scalar = 1.0
    collective: Scalar = 1.0
    waiting: Scalar = 1.0


@_pytree
class Supernode:
    """A machine: `nodes` x `npus_per_node` x `dies_per_npu` ranks on one fabric.

    Fields:
      chip, fabric, exchange, efficiency: its constants. factors: what they leave unexplained.
      engines: serving engines that are known on it; engine: the name of the one meant where none is
        named.
      origin: name in the catalog or path of the file that says how sure the constants are; empty
        where there is none.
    """

    chip: Chip
    fabric: Fabric
    exchange: Exchange
    efficiency: Efficiency
    engines: tuple[Engine, ...]
    factors: Factors = dataclasses.field(default_factory=Factors)
    engine: str = static()
    name: str = static()
    origin: str = static(default="")
    nodes: int = static()
    npus_per_node: int = static()
    dies_per_npu: int = static()

    def running(self, engine: str | None = None) -> Engine:
        """A serving engine by name (default: `self.engine`).

        Raises: ValueError: it is not known on this machine; lists those that are.
        """
        name = engine or self.engine
        for found in self.engines:
            if found.name == name:
                return found
        known = ", ".join(found.name for found in self.engines)
        raise ValueError(f"engine {name!r} is not known on {self.name}; known: {known}")

    def under(self, engine: str | None) -> "Supernode":
        """The machine with another serving engine on it; raises as `running` does."""
        self.running(engine)
        return dataclasses.replace(self, engine=engine or self.engine)

    @property
    def npus(self) -> int:
        return self.nodes * self.npus_per_node

    @property
    def ranks(self) -> int:
        return self.npus * self.dies_per_npu
