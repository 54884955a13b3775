"""Convolution in floating point by short algorithms, with its epilogue: what runs without scales.

    y = act(A^T [(G w) * (B^T x)] + bias)          (Winograd 1980; Lavin and Gray, 2016)

In float32, or in float64 if an operand has it. Direct convolution is XLA's own. Everything else is
one primitive on a signal without stride.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from cmjax.primitives.convolution.geometry import Folding, fold_filter, fold_input
from cmjax.primitives.convolution.grouped import grouped_products
from cmjax.primitives.convolution.lengths import zero_padding_frames
from cmjax.primitives.convolution.plan import ConvPlan, FilterPlan
from cmjax.primitives.convolution.tiles import (
    interleave,
    meet_blocks,
    output_length,
    transform_filter,
    transform_instructions,
    windows,
)
from cmjax.primitives.convolution.toom_cook import ALGORITHMS
from cmjax.primitives.define import define
from cmjax.program import Work, cost_rule, matmul_flops


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformedConv:
    """What `prepack` makes of a filter without scales; a pytree, for `winograd_conv1d` alone.

    Fields:
      filters: G w, one array per point; or only the filter itself, which for "direct" is all that
        is needed, and which the primitive otherwise transforms at each call.
      plan: of the filter.
    """

    filters: tuple[Float[Array, "*depth cout"], ...]
    plan: FilterPlan = dataclasses.field(metadata={"static": True})


def untransformed(w: Float[Array, "taps cin cout"], plan: FilterPlan) -> TransformedConv:
    """A filter that is transformed only inside the primitive, with its derivative."""
    return TransformedConv(filters=(w.astype(_wide(w)),), plan=plan)


def transformed(w: Float[Array, "taps cin cout"], plan: FilterPlan) -> TransformedConv:
    """A filter that is transformed now, for any number of calls."""
    w = w.astype(_wide(w))
    if plan.algorithm == "direct":
        return TransformedConv(filters=(w,), plan=plan)
    return TransformedConv(filters=tuple(_points(w, plan.fold, plan.algorithm)), plan=plan)


def float_conv(
    x: Float[Array, "batch length cin"],
    operands: TransformedConv,
    plan: ConvPlan,
    *,
    bias: Float[Array, "cout"] | None = None,
    valid_range: Int32[Array, "batch 2"] | None = None,
) -> Float[Array, "batch out_length cout"]:
    """Run a plan: fold, transform, multiply, transform back, finish.

    Args:
      x: signal; computed in float32 or float64, and given back in its dtype.
      operands: the filter.
      plan: of the call.
      bias: added to the output.
      valid_range: [start, stop) of the results that are no padding; the frames outside are zero.
    """
    wide = _wide(x, *operands.filters)
    signal, filters = x.astype(wide), tuple(f.astype(wide) for f in operands.filters)
    fold, first = operands.plan.fold, filters[0]
    if operands.plan.algorithm == "direct":
        y = lax.conv_general_dilated(
            signal,
            first,
            (operands.plan.stride,),
            [plan.padding],
            rhs_dilation=(operands.plan.dilation,),
            dimension_numbers=_LAYOUT,
            feature_group_count=operands.plan.groups,
        )
    else:
        ready = len(filters) > 1
        folded, padding = fold_input(signal, plan.padding, fold)
        y = winograd_p.bind(
            folded,
            *(filters if ready else [fold_filter(first, fold)]),
            algorithm=operands.plan.algorithm,
            taps=fold.taps,
            padding=tuple(padding),
            transformed=ready,
            groups=operands.plan.groups,
            channels=operands.plan.cin,
        )
    if bias is not None:
        y = y + bias.astype(wide)
    if plan.slope != 1:
        y = jnp.maximum(y, plan.slope * y)
    y = y.astype(x.dtype)
    return y if valid_range is None else zero_padding_frames(y, valid_range)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _points(w: Array, fold: Folding, algorithm: str) -> list[Array]:
    return transform_filter(fold_filter(w, fold), ALGORITHMS[algorithm], _multiply)


def _wide(*arrays):
    """What is computed in."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _multiply(coefficient, value):
    """The product with a coefficient as the value's dtype has it."""
    return value.dtype.type(coefficient.numerator / coefficient.denominator) * value


_LAYOUT = ("NWC", "WIO", "NWC")


def _reference(x, *filters, algorithm, taps, padding, transformed, groups, channels):
    form = ALGORITHMS[algorithm]
    columns, tiles = windows(x, form, taps=taps, dilation=1, padding=padding)
    u = filters if transformed else transform_filter(filters[0], form, _multiply)
    products = []
    for point, filter_point in zip(form.bt_program.apply(columns, _multiply), u, strict=True):
        seen = meet_blocks(point, tiles, blocks=form.tap_blocks(taps), dilation=1)
        if groups > 1:
            product = functools.partial(grouped_products, groups=groups, channels=channels)
            products.append(product(seen[None], filter_point[None], dtype=x.dtype)[0])
            continue
        batch, count, depth = seen.shape
        rows = seen.reshape(batch * count, depth)  # one product: XLA batches smaller ones worse
        products.append((rows @ filter_point).reshape(batch, count, filter_point.shape[-1]))
    outputs = form.at_program.apply(products, _multiply)
    return interleave(outputs, output_length(x.shape[1], padding, taps, 1))


def _batch(args, dims, **params):
    """A batch of signals joins the batch axis; filters of their own are mapped by XLA."""
    if any(d is not None for d in dims[1:]):
        return jax.vmap(functools.partial(_reference, **params), in_axes=dims)(*args), 0
    x = jnp.moveaxis(args[0], dims[0], 0)
    out = winograd_p.bind(x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), *args[1:], **params)
    return out.reshape(*x.shape[:2], *out.shape[1:]), 0


winograd_p = define("cm_winograd_conv1d", _reference, batch=_batch)


@cost_rule(winograd_p)
def _cost(x, *filters, out, mesh, algorithm, taps, padding, transformed, groups, channels) -> Work:
    """Products on the cube cores, saved by the algorithm; its transforms on the vector cores, and
    there too the products of a depthwise convolution, one multiply-add each."""
    form = ALGORITHMS[algorithm]
    cin, cout = x.shape[2], filters[0].shape[-1]
    blocks = form.tap_blocks(taps)
    tiles = out[0].size / cout / form.m
    flops = tiles * (cin / groups) * cout * (2.0 * form.n * blocks)
    instructions = tiles * cin * transform_instructions(form.bt_program)
    instructions = instructions + tiles * cout * transform_instructions(form.at_program)
    if not transformed:
        filter_values = cin / groups * cout
        instructions += filter_values * (transform_instructions(form.g_program) * blocks)
    if groups == channels > 1:
        return Work(vector_bytes=(instructions + 0.5 * flops) * 4.0, flops=flops + instructions)
    return Work(
        vector_bytes=instructions * 4.0,
        flops=flops + instructions,
        **matmul_flops(jnp.float32, flops, cin / groups * float(blocks)),
    )
