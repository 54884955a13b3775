"""Expert dispatch and combine: the two all-to-alls of a mixture-of-experts layer, as primitives.

Follows FusedDispatch and FusedCombine of CloudMatrix-Infer (Zuo et al., "Serving Large Language
Models on Huawei CloudMatrix384", section 4.2): receive buffers are static, one block of `capacity`
rows for every (source rank, local slot); a row's place in its block is the running count of
earlier rows for that slot; tokens are quantized to INT8 *before* they are sent; and one count per
block (the paper's flag) tells the receiver how many rows are real.

A *slot* is a place for one expert's weights; slots are numbered over all ranks, so the rank of a
slot is `slot // slots_per_rank`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int32, Num

from cmjax.hardware import TIERS
from cmjax.occupancy import reach_probability
from cmjax.primitives.define import Zero, define
from cmjax.program import Size, Work, cost_rule, exchange, ranks_on_tiers


class Dispatched(NamedTuple):
    """What one rank receives, and what it must remember to get its tokens back.

    Rows of block (source, slot) sit at `source * capacity ...`; unused rows are zero.
    """

    rows: Array  # [slots_per_rank, ranks * capacity, hidden], int8 if quantized and not restored
    scale: Float32[Array, "slots rows"]  # value of one int8 step of a row; ones if not quantized
    counts: Int32[Array, "ranks slots"]  # real rows in each block received
    position: Int32[Array, "tokens copies"]  # place of each copy in its block; >= capacity: dropped
    dropped: Int32[Array, ""]  # copies this rank could not send because their block was full


def dispatch(
    x: Float[Array, "tokens hidden"],
    slots: Int[Array, "tokens copies"],
    *,
    axes: tuple[str, ...],
    ranks: int,
    slots_per_rank: int,
    capacity: Any = None,
    quantize: bool = False,
    restore: bool = False,
    priority: Float[Array, "tokens copies"] | None = None,
) -> Dispatched:
    """Send each token to the ranks of its `slots`.

    Args:
      x: this rank's tokens, floating point.
      slots: int32 physical slot numbers, 0 to `ranks * slots_per_rank - 1`.
      axes: mesh axes that enumerate the ranks row-major; `()` with `ranks=1` for no communication.
      ranks: product of the axes' sizes.
      slots_per_rank: slots on each rank.
      capacity: rows reserved for each (source rank, slot); an int or a symbolic dimension. `None`
        means `tokens`, which never drops where a token visits a slot at most once. A copy beyond
        capacity is not sent, counts in `dropped`, and gets weight zero in `combine`.
      quantize: send INT8 with one scale per token, `scale = max|x| / 127`.
      restore: multiply quantized rows by their scale on arrival, into the dtype of `x`; for
        training through an INT8 exchange.
      priority: who keeps a place when a block is full: higher values first, then earlier tokens.
        Routing weights make it DeepSeek-V2's rule (Liu et al. 2024, section 2.2.3: the lowest
        affinities are dropped); `None` is GShard's, the latest tokens are dropped.
    Gradient: that of a permutation, also through quantization with `restore` (straight-through).
      Rows that stay integers are constants: the gradient with respect to `x` is then zero.
    Raises: ValueError naming the argument for shapes, dtypes, a capacity below 1, ranks without
      axes, or `restore` without `quantize`.
    Source: FusedDispatch of CloudMatrix-Infer (arXiv:2506.12708, section 4.2).
    Example: one rank with two experts, each of which gets both tokens.

      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> slots = jnp.array([[0, 1], [1, 0]])
      >>> sent = dispatch(x, slots, axes=(), ranks=1, slots_per_rank=2)
      >>> sent.rows.shape, sent.counts.tolist(), int(sent.dropped)
      ((2, 2, 2), [[2, 2]], 0)
    """
    if capacity is None:
        capacity = x.shape[0]
    params = {
        "axes": tuple(axes),
        "ranks": ranks,
        "slots_per_rank": slots_per_rank,
        "capacity": capacity,
        "quantize": bool(quantize),
        "restore": bool(restore),
    }
    operands = (x, slots.astype(jnp.int32))
    if priority is not None:
        operands = (*operands, lax.stop_gradient(priority.astype(jnp.float32)))
    _check_dispatch(*map(jax.typeof, operands), **params)
    return Dispatched(*dispatch_p.bind(*operands, **params))


def combine(
    rows: Float[Array, "slots rows hidden"],
    slots: Int[Array, "tokens copies"],
    position: Int[Array, "tokens copies"],
    weights: Float[Array, "tokens copies"],
    *,
    axes: tuple[str, ...],
    ranks: int,
    slots_per_rank: int,
    capacity: Any = None,
) -> Float[Array, "tokens hidden"]:
    """Return expert outputs to the ranks their tokens came from and add them up.

        y[t] = sum over copies c of weights[t, c] * rows(slots[t, c], position[t, c])

    Args:
      rows: expert outputs in the layout `dispatch` delivered, `[slots_per_rank, ranks * capacity,
        hidden]`.
      slots, position: as given to and returned by `dispatch`.
      weights: routing weights; the sum is taken in float32.
      axes, ranks, slots_per_rank, capacity: as given to `dispatch`.
    Returns: tokens in the dtype of `rows`. Dropped copies count as zero.
    Gradient: that of the formula, for `rows` and `weights`.
    Raises: ValueError naming the argument for shapes or dtypes that do not fit each other, a
      capacity below 1, or ranks without axes.
    Source: FusedCombine of CloudMatrix-Infer (arXiv:2506.12708, section 4.2).
    Example: experts that change nothing give every token back.

      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> slots, layout = jnp.array([[0, 1], [1, 0]]), {"ranks": 1, "slots_per_rank": 2}
      >>> sent = dispatch(x, slots, axes=(), **layout)
      >>> combine(sent.rows, slots, sent.position, jnp.full((2, 2), 0.5), axes=(), **layout)
      Array([[1., 2.],
             [3., 4.]], dtype=float32)
    """
    if capacity is None:
        capacity = slots.shape[0]
    params = {
        "axes": tuple(axes),
        "ranks": ranks,
        "slots_per_rank": slots_per_rank,
        "capacity": capacity,
    }
    slots, position = slots.astype(jnp.int32), position.astype(jnp.int32)
    weights = weights.astype(jnp.float32)
    _check_combine(*map(jax.typeof, (rows, slots, position, weights)), **params)
    return combine_p.bind(rows, slots, position, weights, **params)


def quantize_rows(x: Float[Array, "*rows hidden"]) -> tuple[Array, Float32[Array, "*rows"]]:
    """INT8 with one scale per row: `x ~ q * scale[..., None]`, error at most `scale / 2`.

    Args:
      x: floating point, any number of rows; a row of zeros stays zero.
    Returns: int8 steps of the shape of `x`, and their value per row, float32.
    Example:

      >>> q, scale = quantize_rows(jnp.array([[127.0, -63.6], [0.0, 0.0]]))
      >>> q.tolist(), float(scale[0])
      ([[127, -64], [0, 0]], 1.0)
    """
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-12) / 127
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def round_trip_bytes(hidden: int, *, quantize: bool, itemsize: int = 2) -> float:
    """Bytes that one copy of a token puts on the links: its dispatch message and its combine row.

    Args:
      hidden: values of a token.
      quantize: dispatched as INT8 with its scale; the way back is in full precision always.
      itemsize: bytes of a value in full precision.

    >>> round_trip_bytes(7168, quantize=True)  # 7,680 there and 14,336 back
    22016
    """
    return _message_bytes(hidden, quantize, itemsize) + hidden * itemsize


def gather_ranks(x: Num[Array, "n *rest"], axes: tuple[str, ...]) -> Num[Array, "gathered *rest"]:
    """Concatenate every rank's `x` on axis 0, in rank order.

    One `lax.all_gather` per mesh axis, innermost first: each rank receives the same bytes as in a
    flat all-gather, the small steps stay within an NPU and a node, and virtual axes allow it (JAX
    does not batch an all-gather over a tuple of axes).
    """
    for axis in reversed(axes):
        x = lax.all_gather(x, axis, axis=0, tiled=True)
    return x


def _dispatch_reference(
    x, slots, *priority, axes, ranks, slots_per_rank, capacity, quantize, restore
):
    tokens, copies = slots.shape
    total = ranks * slots_per_rank
    flat = slots.reshape(tokens * copies)
    wanted, position = _running_count(flat, total, *priority)
    dtype = x.dtype

    if quantize:
        x, scale = quantize_rows(x)
    else:
        scale = jnp.ones_like(x[:, 0], jnp.float32)

    def send(values):
        """Lay [tokens, ...] out in static blocks, and exchange the blocks."""
        each = jnp.stack([values] * copies, axis=1)  # its transpose adds slices, not over an axis
        each = each.reshape(tokens * copies, *values.shape[1:])
        blocks = jnp.zeros((total, capacity, *values.shape[1:]), values.dtype)
        # No two copies share a place; those beyond capacity are dropped.
        blocks = blocks.at[flat, position].set(each, mode="drop", unique_indices=True)
        blocks = _exchange(blocks.reshape(ranks, slots_per_rank, *blocks.shape[1:]), axes)
        blocks = jnp.swapaxes(blocks, 0, 1)
        return blocks.reshape(slots_per_rank, ranks * capacity, *values.shape[1:])

    rows = send(x)
    # Without quantization nothing but the rows crosses the network.
    scale = send(scale) if quantize else jnp.ones_like(rows[:, :, 0], jnp.float32)
    if restore:
        rows = (rows.astype(jnp.float32) * scale[..., None]).astype(dtype)
    sent = jnp.minimum(wanted, capacity)
    counts = _exchange(sent.reshape(ranks, slots_per_rank), axes)
    dropped = jnp.sum(wanted - sent, dtype=jnp.int32)
    return [rows, scale, counts, position.reshape(tokens, copies), dropped]


def _combine_reference(rows, slots, position, weights, *, axes, ranks, slots_per_rank, capacity):
    hidden = rows.shape[-1]
    blocks = jnp.swapaxes(rows.reshape(slots_per_rank, ranks, capacity, hidden), 0, 1)
    blocks = _exchange(blocks, axes).reshape(ranks * slots_per_rank, capacity, hidden)
    each = blocks.at[slots, position].get(mode="fill", fill_value=0)  # dropped copies: zero
    # copy by copy: XLA's reduction over so short an axis is slow on CPU
    parts = [each[:, c].astype(jnp.float32) * weights[:, c, None] for c in range(slots.shape[1])]
    return functools.reduce(jnp.add, parts).astype(rows.dtype)


def _dispatch_jvp(p, primals, tangents, *, quantize, restore, **params):
    """A permutation of rows is linear; rounding is passed straight through where rows are floats
    again on arrival, and everything else is an integer or a scale held constant."""
    out = p.bind(*primals, quantize=quantize, restore=restore, **params)
    constant = [Zero(jax.typeof(o).to_tangent_aval()) for o in out]
    dx = tangents[0]
    if type(dx) is Zero or (quantize and not restore):
        return out, constant
    rows = _dispatch_reference(dx, *primals[1:], quantize=False, restore=False, **params)[0]
    return out, [rows, *constant[1:]]


def _running_count(flat, total, priority=None):
    """How often each slot occurs, and for each entry how many entries before it share its slot;
    before it in order, or in priority."""
    counts = jnp.zeros((total,), jnp.int32).at[flat].add(1)
    starts = jnp.cumsum(counts) - counts
    if priority is None:
        order = jnp.argsort(flat, stable=True)
    else:
        order = jnp.lexsort((-priority.reshape(flat.shape), flat))
    place = lax.iota(jnp.int32, flat.shape[0]) - starts[flat[order]]
    return counts, jnp.zeros_like(flat).at[order].set(place)


def _exchange(blocks, axes):
    """Block i of rank j becomes block j of rank i."""
    return lax.all_to_all(blocks, axes, 0, 0, tiled=True) if axes else blocks


def _check_layout(what, axes, ranks, slots_per_rank):
    if ranks < 1 or slots_per_rank < 1:
        raise ValueError(
            f"{what}: ranks and slots_per_rank must be at least 1, got {ranks} and {slots_per_rank}"
        )
    if not axes and ranks != 1:
        raise ValueError(
            f"{what}: {ranks} ranks need the mesh axes that enumerate them, got axes=(); "
            "use ranks=1 for a program without communication"
        )


def _check_pair(what, first, first_name, second, second_name):
    if tuple(first.shape) != tuple(second.shape):
        raise ValueError(
            f"{what}: {first_name} and {second_name} must both be [tokens, copies], "
            f"got {first.shape} and {second.shape}"
        )


def _check_dispatch(x, slots, *priority, axes, ranks, slots_per_rank, capacity, quantize, restore):
    _check_layout("dispatch", axes, ranks, slots_per_rank)
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"dispatch: x must be floating point [tokens, hidden], got {x.dtype}{list(x.shape)}"
        )
    if slots.ndim != 2 or slots.shape[0] != x.shape[0]:
        raise ValueError(
            f"dispatch: slots must be [tokens, copies] with {x.shape[0]} tokens, got {slots.shape}"
        )
    if priority:
        _check_pair("dispatch", slots, "slots", priority[0], "priority")
    if restore and not quantize:
        raise ValueError(
            "dispatch: restore=True turns INT8 rows back into floats; it needs quantize=True"
        )
    if isinstance(capacity, int) and capacity < 1:
        raise ValueError(f"dispatch: capacity must be at least 1 row, or None, got {capacity}")


def _check_combine(rows, slots, position, weights, *, axes, ranks, slots_per_rank, capacity):
    _check_layout("combine", axes, ranks, slots_per_rank)
    _check_pair("combine", slots, "slots", position, "position")
    _check_pair("combine", slots, "slots", weights, "weights")
    expected = (slots_per_rank, ranks * capacity)
    if rows.ndim != 3 or tuple(rows.shape[:2]) != expected:
        raise ValueError(
            f"combine: rows must be [slots_per_rank, ranks * capacity, hidden] = "
            f"[{expected[0]}, {expected[1]}, hidden], got {rows.shape}"
        )


dispatch_p = define(
    "cm_dispatch",
    _dispatch_reference,
    check=_check_dispatch,
    jvp=_dispatch_jvp,
    collective=True,
    multiple_results=True,
)
combine_p = define("cm_combine", _combine_reference, check=_check_combine, collective=True)


@cost_rule(dispatch_p)
def _dispatch_cost(
    x,
    slots,
    *priority,
    out,
    mesh,
    axes,
    ranks,
    slots_per_rank,
    capacity,
    quantize,
    restore,
) -> Work:
    """FusedDispatch on the slowest rank, which sends and receives as many rows as it holds.

    The copies of a rank's tokens are divided over its vector cores; a core reads, quantizes and
    writes them into the receivers' slots one by one. The flags of every source rank are counted
    and polled, and what arrived is copied from the window into contiguous rows. A rank alone sends
    nothing: it puts its rows in the order of its experts, as any kernel of the vector cores.
    """
    hidden = x.shape[1].constant
    rows = out[0].shape[0] * out[0].shape[1]
    copies = slots.size
    message = _message_bytes(hidden, quantize, x.itemsize)
    floats = rows * (hidden * x.itemsize) if restore else 0.0
    traffic: dict[str, Any] = {}
    if ranks > 1:
        traffic = _traffic(rows * message, slots.shape[1].constant, axes, mesh)
        traffic |= _copies(copies, message, axes, mesh)
        traffic |= {"kind": "dispatch", "flags": ranks, "local_bytes": rows * (2.0 * message)}
    return Work(
        vector_bytes=copies * (hidden * x.itemsize * (4.0 if quantize else 1.0)) + floats * 2.0,
        read_bytes=copies * (hidden * x.itemsize) + (rows * message if restore else 0.0),
        write_bytes=rows * message + floats,
        **traffic,
    )


@cost_rule(combine_p)
def _combine_cost(
    rows, slots, position, weights, *, out, mesh, axes, ranks, slots_per_rank, capacity
) -> Work:
    """FusedCombine on the slowest rank: rows return one by one in full precision; a token is
    summed when its copies are complete."""
    hidden = rows.shape[2].constant
    count = rows.shape[0] * rows.shape[1]
    copies = slots.size
    row = hidden * rows.itemsize
    traffic: dict[str, Any] = {}
    if ranks > 1:
        traffic = _traffic(count * row, slots.shape[1].constant, axes, mesh)
        traffic |= _copies(count, row, axes, mesh)
        traffic |= {"kind": "combine", "local_bytes": copies * row + out[0].nbytes}
    return Work(
        vector_bytes=copies * (2.0 * hidden * 4),
        flops=copies * (2.0 * hidden),
        read_bytes=count * row,
        write_bytes=copies * row if ranks > 1 else out[0].nbytes,
        **traffic,
    )


def _traffic(nbytes: Size, copies: float, axes, mesh) -> dict:
    """Bytes by tier. A token with `copies` experts spread evenly over N nodes reaches
    (N - 1) (1 - (1 - 1/N)**copies) other nodes, against copies (N - 1) / N rows sent there."""
    nodes = ranks_on_tiers(axes, mesh)["supernode"]
    distinct = nodes * reach_probability(1 / nodes, copies) / copies
    fields = exchange(nbytes, axes, mesh)
    return fields | {
        "once_per_node_bytes": fields["supernode_bytes"] * distinct,
        "launches": 1.0,
    }


def _copies(copies: Size, message: float, axes, mesh) -> dict:
    """Messages that a rank writes into others one by one, evenly spread over the ranks."""
    tiers = exchange(copies, axes, mesh)
    return {"copies": copies, "copy_bytes": copies * message} | {
        f"{tier}_copies": tiers[f"{tier}_bytes"] for tier in TIERS
    }


def _message_bytes(hidden: float, quantize: bool, itemsize: float) -> float:
    """One token on the wire: INT8 with 44 bytes of scale and indices, in 512-byte blocks.

    7,168 values make 7,680 bytes (paper section 4.2: 7.5 KB), or 14,336 unquantized (14 KB).
    """
    return math.ceil((hidden + 44) / 512) * 512 if quantize else hidden * itemsize
