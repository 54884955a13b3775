"""How long one operation takes: the slowest of its engines, plus what cannot overlap.

A compute kernel's time is

    t = startup * launches + max(cube, vector, hbm, inner) + min(cube, vector) / PIPELINE_TILES
        + exposed * (cube + hbm + inner - max(cube, hbm, inner))

with the start-up of its class (with matrix products, attention, or neither) and
cube = FLOP / (peak * share * efficiency), and so on; inner is the time of the inner blocks, which a
core takes in order however small its tile. The term behind it is the hand-over between cube and
vector cores: they work on tiles in turn, so the shorter one is exposed for one tile. The last one
is of kernels with matrix products: tiles that are not full, or do not fill the last wave of cores.
Of a stack of experts HBM reads those that have rows.
A collective's time is given in `fabric.py`, and how long it waits for other ranks in `waiting.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cmjax.cost.fabric import Work, exchange_s, overflow
from cmjax.cost.waiting import NONE, Differences, waits_s
from cmjax.hardware import Supernode
from cmjax.program import Program
from cmjax.program.work import COMPUTE

_CUBE = ("cube_flops_8bit", "cube_flops_16bit", "cube_flops_32bit")
PIPELINE_TILES = 8.0
"""Tiles a fused kernel passes between cube and vector cores; 1/8 of the shorter one is exposed."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seconds:
    """Seconds of every operation of one program level, by engine, and as scheduled.

    Fields:
      cube, vector, hbm, fabric: how long it keeps each engine busy; a stream that owns a third of
        the die's cores keeps a third of that engine busy.
      waiting: for the slowest rank, before it. total: from its start to its end, waiting included.
      skew: what another stream that needs its result waits longer, for the slowest rank's.

    Leading axes are those of a batch, and of the loops around the level whose iterations differ.
    """

    cube: Float[Array, "*loops operations"]
    vector: Float[Array, "*loops operations"]
    hbm: Float[Array, "*loops operations"]
    fabric: Float[Array, "*loops operations"]
    waiting: Float[Array, "*loops operations"]
    total: Float[Array, "*loops operations"]
    skew: Float[Array, "*loops operations"]


@dataclasses.dataclass(frozen=True)
class _Static:
    """What does not change with sizes or machine constants, per operation."""

    cube_share: np.ndarray
    matrix: np.ndarray
    vector_cores: np.ndarray
    vector_share: np.ndarray
    attention: np.ndarray
    grouped: np.ndarray
    compute: np.ndarray
    permutes: np.ndarray
    kind: np.ndarray
    reach: np.ndarray
    stream: np.ndarray  # one-hot [streams, operations]


def largest(terms, temperature: float, axis: int = 0):
    """Maximum along `axis`; smooth (log-sum-exp, in seconds) if `temperature` is positive."""
    if temperature == 0:
        return jnp.max(terms, axis)
    return temperature * jax.nn.logsumexp(terms / temperature, axis)


def seconds(
    program: Program,
    work: Work,
    machine: Supernode,
    temperature: float,
    period_s=None,
    differences: Differences = NONE,
) -> Seconds:
    """Time of every operation of one level.

    Args:
      program: the level's operations.
      work: of each, by field.
      machine: its constants; gradients flow to its leaves.
      temperature: 0 for exact maxima, else the smoothing scale in seconds.
      period_s: time the level takes when its streams do not disturb one another; with it, the
        times include what they cost one another.
      differences: between the work of ranks.
    """
    static = _static(program, machine.chip.cube_cores, machine.chip.vector_cores)
    chip, efficiency = machine.chip, machine.efficiency

    matrix_efficiency = jnp.where(static.grouped, efficiency.grouped, efficiency.gemm)
    matrix_efficiency = jnp.where(static.attention, efficiency.attention, matrix_efficiency)
    cube = (
        work["cube_flops_8bit"] / chip.cube_flops_8bit
        + work["cube_flops_16bit"] / chip.cube_flops_16bit
        + work["cube_flops_32bit"] / chip.cube_flops_32bit
    ) / (static.cube_share * matrix_efficiency)
    inner = work["inner_blocks"] * chip.inner_block_s
    vector = work["vector_bytes"] / (chip.vector_bytes_per_s * static.vector_share)
    hbm_rate = chip.hbm_bytes_per_s * efficiency.hbm
    unread = _unread_bytes(work["stack_bytes"], work["stack_row_bytes"])
    hbm = (work["read_bytes"] + work["write_bytes"] - unread) / hbm_rate
    runs = 1.0
    if static.permutes.any():  # an exchange that fits L2 has kernels which need no such
        rows = jnp.maximum(work["read_bytes"], work["write_bytes"])
        runs = jnp.where(static.permutes, overflow(rows, machine), 1.0)
        hbm = hbm * runs
    wire, chain, fixed, disturbing, held = exchange_s(work, static, machine)
    startup = (
        work["launches"]
        * runs
        * (
            chip.matrix_startup_s * (static.matrix & ~static.attention)
            + chip.attention_startup_s * static.attention
            + chip.vector_startup_s * (static.compute & ~static.matrix & ~static.attention)
            + chip.collective_startup_s * (static.kind == "collective")
        )
    )
    factor = _factor(static, machine)
    exposed = static.matrix * jnp.where(
        static.attention, efficiency.attention_exposed, efficiency.exposed
    )

    def longest(*engines):
        return largest(jnp.stack(jnp.broadcast_arrays(*engines)), temperature)

    def combined(cube, vector, hbm):
        kernel = longest(cube, vector, hbm, inner, wire, chain)
        product = cube + hbm + inner - longest(cube, hbm, inner)
        shown = jnp.minimum(cube, vector) / PIPELINE_TILES + exposed * product
        return factor * (kernel + shown + startup + fixed)

    total = combined(cube, vector, hbm)
    if period_s is not None and len(static.stream) > 1:
        hbm_left, interference = _contention(static, hbm, total, disturbing, period_s, held)
        slow = 1 + machine.exchange.interference * interference
        total = combined(cube * slow, vector * slow, hbm * slow / hbm_left)
    # of the most loaded rank's work rows are more, and the experts' matrices are not
    more = 1.0 - 1.0 / differences.load
    rows = jnp.maximum(hbm - work["stack_bytes"] / hbm_rate, 0.0)
    mean = cube - more * cube, vector - more * vector, hbm - more * rows
    excess = factor * (longest(cube, vector, hbm) - longest(*mean))
    waiting, skew = waits_s(program, total, excess, machine, differences)
    busy = cube * static.cube_share, vector * static.vector_share, hbm, wire
    cube, vector, hbm, wire = (jnp.broadcast_to(each, total.shape) for each in busy)
    return Seconds(cube, vector, hbm, wire, waiting, total + waiting, skew)


def _unread_bytes(stack, row_stack):
    """Bytes of the experts that no row goes to.

    Rows fall on the experts of a stack like Poisson counts of mean m, so exp(-m) of them have none.
    """
    some = stack > 0
    mean = jnp.where(some, row_stack, 0.0) / jnp.where(some, stack, 1.0)
    return stack * jnp.exp(-mean)


def _factor(static: _Static, machine: Supernode):
    """What the model leaves unexplained of every operation, by its kind."""
    factors = machine.factors
    exchange = np.isin(static.kind, ["dispatch", "combine"])
    collective = static.kind == "collective"
    matrix = static.matrix & static.compute & ~static.attention
    vector = ~(matrix | static.attention | exchange | collective)
    return (
        factors.matrix * matrix
        + factors.attention * static.attention
        + factors.vector * vector
        + factors.exchange * exchange
        + factors.collective * collective
    )


def _contention(static: _Static, hbm, total, disturbing, period_s, held):
    """What the streams of a level take from one another while they overlap.

    Streams a and b, busy for D_a and D_b of a period P, overlap for O = D_a + D_b - P. For that
    part of its time a compute kernel finds HBM busy with the other stream's kernels, and bytes on
    the wire that slow it down; both are averaged over the stream. Two kernels that read at once
    get half of HBM each, so that a kernel which finds it busy for a part u of its time has the
    share 1 - u/2: two streams that do nothing else take twice as long, as bytes are conserved.
    Where exchanges hold cores, matrix products beside a stream with one are started on what is
    left, whether bytes move or not: their persistent kernels are given a number of cores for as
    long as the streams run (SGLang's two-batch overlap and `deep_gemm.set_num_sms`, recalled).
    `held` is the share of an exchange that goes by kernels which do (`fabric.exchange_s`).

    Returns: per operation, the share of HBM bandwidth left to it, and the share of its time beside
      an exchange (both trivial for exchanges themselves).
    """
    busy = static.stream @ total
    safe = jnp.maximum(busy, 1e-12)
    most = jnp.minimum(busy[:, None], busy[None, :])
    overlap = jnp.clip(busy[:, None] + busy[None, :] - period_s, 0.0, most)
    overlap = overlap * (1.0 - np.eye(len(static.stream))) / safe[:, None]
    hbm_busy = static.stream @ jnp.where(static.compute, jnp.minimum(hbm, total), 0.0) / safe
    exchanging = static.stream @ disturbing / safe
    hbm_left = 1.0 - jnp.minimum(overlap @ hbm_busy, 1.0) / 2
    beside = jnp.minimum(overlap @ exchanging, 1.0)
    stream_of = static.stream.T
    beside = stream_of @ beside
    most_held = jnp.max(static.stream * held, -1)
    others = jnp.max((1.0 - np.eye(len(static.stream))) * most_held, -1)
    products = static.matrix & ~static.attention
    beside = jnp.where(products, jnp.maximum(beside, stream_of @ others), beside)
    return (
        jnp.where(static.compute, stream_of @ hbm_left, 1.0),
        jnp.where(static.compute, beside, 0.0),
    )


@functools.lru_cache(maxsize=256)
def _static(program: Program, cube_cores: int, vector_cores: int) -> _Static:
    operations = program.operations
    cube = np.array([op.stream.cube_cores or cube_cores for op in operations], float)
    vector = np.array([op.stream.vector_cores or vector_cores for op in operations], float)
    for name, given, most in (("cube", cube, cube_cores), ("vector", vector, vector_cores)):
        if (given > most).any():
            op = operations[int(given.argmax())]
            raise ValueError(
                f"stream {op.stream.name!r} asks for {int(given.max())} {name} cores; "
                f"the chip has {most}"
            )
    kinds = np.array([op.work.kind for op in operations])
    streams = sorted({op.stream.name for op in operations if op.loop is None})
    return _Static(
        cube_share=cube / cube_cores,
        matrix=np.array([any(op.work.column(f).terms for f in _CUBE) for op in operations], bool),
        vector_cores=vector,
        vector_share=vector / vector_cores,
        attention=kinds == "attention",
        grouped=kinds == "grouped",
        compute=np.isin(kinds, COMPUTE),
        permutes=kinds == "permute",
        kind=kinds,
        reach=np.array([op.work.reach for op in operations], int),
        stream=np.array([[op.stream.name == s for op in operations] for s in streams], float),
    )
