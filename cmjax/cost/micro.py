"""Micro-benchmarks as priced programs: one kernel or one exchange, the way vendors measure them.

They are traced from the same primitives as a model and priced by the same rules; calibration
compares them with published measurements and nothing else.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from difflib import get_close_matches

import jax
import jax.numpy as jnp

from cmjax.cost.price import price
from cmjax.cost.ranks import mesh_for
from cmjax.cost.waiting import wait_s
from cmjax.hardware import Supernode
from cmjax.inputs import check_count, shown
from cmjax.primitives import attention, combine, dispatch, latent_attention
from cmjax.primitives.grouped import stacked_dot
from cmjax.program import Program, fused, trace

_FORMATS = ("quant", "kv_cache")
_COPIES, _EXPERTS = 8, 256
_DTYPES = {"int8": jnp.int8, "bf16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class MicroBenchmark:
    """A traced micro-benchmark, how its result is reported, and whose kernels it runs.

    `after_s`: of what work its `ranks` come, so that they wait for the slowest one.
    """

    program: Program
    flops: float
    kv_bytes: float
    engine: str | None = None
    ranks: int = 1
    after_s: float = 0.0

    def measure(self, machine: Supernode) -> dict:
        """Results on `machine`, differentiable in its constants.

        Returns: `us` (time), `tflops` (useful FLOP over time), `utilization` (of the 8- or 16-bit
        peak), `gb_per_s` (cache or weight bytes over time).
        """
        machine = machine.under(self.engine)
        seconds = price(self.program, machine, {}).total_s
        seconds += wait_s(self.after_s, self.ranks, machine)
        totals = self.program.totals({})
        peak = (
            machine.chip.cube_flops_8bit
            if totals["cube_flops_8bit"]
            else machine.chip.cube_flops_16bit
        )
        return {
            "us": seconds * 1e6,
            "tflops": self.flops / 1e12 / seconds,
            "utilization": (self.flops / peak) / seconds,
            "gb_per_s": self.kv_bytes / 1e9 / seconds,
        }


def micro_exchange(
    machine: Supernode,
    *,
    operator: str,
    ep: int,
    tokens: int,
    copies: int = _COPIES,
    hidden: int = 7168,
    experts: int = _EXPERTS,
    quant: str = "int8",
    engine: str | None = None,
    after: int = 0,
) -> MicroBenchmark:
    """One dispatch or combine of `tokens` tokens a rank, `copies` experts each, evenly spread,
    with the kernels of a serving engine (default: the machine's first one), as a rank of mean speed
    sees it after `after` microseconds of work (0: all ranks start together)."""
    machine.running(engine)
    mesh = mesh_for(ep, machine)
    check_count("micro: tokens x copies", tokens * copies, most=2**31 - 1)
    slots_per_rank = max(1, experts // ep)
    common = {"axes": mesh.axes, "ranks": ep, "slots_per_rank": slots_per_rank}
    (capacity,) = jax.export.symbolic_shape("capacity")
    x = jax.ShapeDtypeStruct((tokens, hidden), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((tokens, copies), jnp.int32)
    rows = jax.ShapeDtypeStruct((slots_per_rank, ep * capacity, hidden), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((tokens, copies), jnp.float32)

    def send(x, slots):
        return dispatch(x, slots, capacity=capacity, quantize=quant == "int8", **common).rows

    def receive(rows, slots, weights):
        return combine(rows, slots, slots, weights, capacity=capacity, **common)

    axis_sizes = dict(zip(mesh.axes, mesh.shape, strict=True))
    if operator == "dispatch":
        program = _traced(machine, send, x, slots, axis_sizes=axis_sizes)
    else:
        program = trace(receive, rows, slots, weights, axis_sizes=axis_sizes)
    filled = tokens * copies / (ep * slots_per_rank)
    return MicroBenchmark(program.at(capacity=filled), 0.0, 0.0, engine, ep, after * 1e-6)


def micro_gemm(
    machine: Supernode, *, m: int, k: int, n: int, groups: int = 1, quant: str = "int8"
) -> MicroBenchmark:
    """`groups` matrix products [m, k] x [k, n] in one kernel, as of experts where there are many;
    `m` is then the mean of their rows."""
    dtype = _DTYPES[quant]

    def product(x, w):
        return stacked_dot(x, w).astype(jnp.bfloat16)

    stack = (groups,) if groups > 1 else ()
    program = _traced(
        machine,
        fused("GEMM")(product),
        jax.ShapeDtypeStruct((*stack, m, k), dtype),
        jax.ShapeDtypeStruct((*stack, k, n), dtype),
    )
    weight_bytes = groups * k * n * jnp.dtype(dtype).itemsize
    return MicroBenchmark(program, 2.0 * groups * m * k * n, float(weight_bytes))


def micro_latent_attention(
    machine: Supernode,
    *,
    batch: int,
    q_len: int,
    heads: int,
    context: int,
    kv_cache: str = "bf16",
    latent: int = 512,
    rope: int = 64,
) -> MicroBenchmark:
    """Absorbed MLA decode over a latent cache of `context` tokens a request."""
    bf16, cached = jnp.bfloat16, _DTYPES[kv_cache]
    shape = jax.ShapeDtypeStruct
    arguments = [
        shape((batch, q_len, heads, latent), bf16),
        shape((batch, q_len, heads, rope), bf16),
        shape((batch, context, latent), cached),
        shape((batch, context, rope), bf16),
        shape((batch,), jnp.int32),
    ]
    if kv_cache == "int8":
        arguments.append(shape((batch, context), jnp.float32))

    def decode(q_latent, q_rope, latent, rope, lengths, scale=None):
        return latent_attention(q_latent, q_rope, latent, scale, rope, lengths, scale=1.0)

    program = _traced(machine, decode, *arguments)
    kv_bytes = batch * context * (latent * jnp.dtype(cached).itemsize + 2 * rope)
    flops = 2.0 * batch * q_len * heads * context * (2 * latent + rope)
    return MicroBenchmark(program, flops, float(kv_bytes))


def micro_decode_attention(
    machine: Supernode,
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    context: int,
    q_len: int = 1,
    d: int = 128,
) -> MicroBenchmark:
    """Grouped-query attention of new tokens over a bfloat16 cache of `context` tokens a request.

    Raises: ValueError: heads that share no whole number of query heads.
    """
    if heads % kv_heads:
        raise ValueError(f"{kv_heads} KV heads do not share {heads} query heads evenly")
    q = jax.ShapeDtypeStruct((batch, q_len, heads, d), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((batch, context, kv_heads, d), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def decode(q, k, v, lengths):
        return attention(q, k, v, scale=1.0, causal=True, lengths=lengths)

    program = _traced(machine, decode, q, k, k, lengths)
    flops = 4.0 * batch * q_len * heads * context * d
    return MicroBenchmark(program, flops, 4.0 * batch * context * kv_heads * d)


def micro_attention(
    machine: Supernode, *, batch: int, length: int, heads: int, d: int = 192, dv: int = 128
) -> MicroBenchmark:
    """Causal prefill attention (expanded MLA) of whole sequences."""
    bf16 = jnp.bfloat16
    q = jax.ShapeDtypeStruct((batch, length, heads, d), bf16)
    v = jax.ShapeDtypeStruct((batch, length, heads, dv), bf16)
    program = _traced(machine, lambda q, k, v: attention(q, k, v, scale=1.0, causal=True), q, q, v)
    return MicroBenchmark(program, 1.0 * batch * heads * length**2 * (d + dv), 0.0)


def _traced(machine: Supernode, function: Callable, *arguments, **options) -> Program:
    """The program, if what it is given fits into the memory of a die."""
    needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in arguments)
    room = machine.chip.hbm_bytes
    if isinstance(room, int | float) and needed > room:
        raise ValueError(
            f"micro: operands of {needed / 1e9:,.4g} GB; a die of {machine.name} has "
            f"{room / 1e9:,.4g} GB"
        )
    return trace(function, *arguments, **options)


MICROS: dict[str, Callable[..., MicroBenchmark]] = {
    "dispatch": functools.partial(micro_exchange, operator="dispatch"),
    "combine": functools.partial(micro_exchange, operator="combine"),
    "gemm": micro_gemm,
    "latent-attention": micro_latent_attention,
    "decode-attention": micro_decode_attention,
    "attention": micro_attention,
}


def micro(operator: str, machine: Supernode, **options) -> MicroBenchmark:
    """Build a micro-benchmark by name; ValueError names an unknown operator or option."""
    if operator not in MICROS:
        close = get_close_matches(operator, MICROS, n=2) or list(MICROS)
        raise ValueError(f"unknown operator {operator!r}; closest: {', '.join(close)}")
    for name, value in options.items():
        if name in _FORMATS and value not in _DTYPES:
            raise ValueError(
                f"operator {operator}: {name} must be {' or '.join(_DTYPES)}, got {shown(value)}"
            )
        if name not in (*_FORMATS, "engine"):
            check_count(f"operator {operator}: {name}", value, least=int(name != "after"))
    if "copies" in options or "experts" in options:
        most = options.get("experts", _EXPERTS)
        check_count(f"operator {operator}: copies", options.get("copies", _COPIES), most=most)
    try:
        return MICROS[operator](machine, **options)
    except (TypeError, KeyError) as error:
        raise ValueError(f"operator {operator}: {error}") from None
