"""Splitting a layer over tensor-parallel ranks: Megatron's f and g, with sequence parallelism.
A sequence may be split over further ranks, which gather each other's keys and values (context
parallelism as Llama 3 has it, arXiv 2407.21783, section 3.3.2).

    f: identity forward, all-reduce backward        g: all-reduce forward, identity backward
    with sequence parallelism (arXiv 2205.05198): all-gather and reduce-scatter in their place

The derivatives are written out, since each rank's loss is the *same* loss: a gradient that every
rank has once must not be summed over them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class TensorSplit:
    """How the ranks of a mesh axis share a layer, and those of another one its sequences.

    Fields:
      ranks: of the axis. sequence: whether they also share the sequence between blocks.
      axis: name of the mesh axis; unused with one rank.
      context: ranks that have a part each of every sequence. context_axis: name of their axis.
    """

    ranks: int = 1
    sequence: bool = False
    axis: str = "tensor"
    context: int = 1
    context_axis: str = "context"

    def enter(self, x: Float[Array, "batch part hidden"]) -> Float[Array, "batch sequence hidden"]:
        """What a column-parallel map reads: the whole sequence."""
        if self.ranks == 1:
            return x
        return _gather(x, self.axis) if self.sequence else _copy(x, self.axis)

    def columns(self, x: Float[Array, "batch part hidden"], *kernels: Array) -> tuple[Array, ...]:
        """Products of the whole sequence with some column-parallel matrices. Only this rank's part
        of `x` is kept for the backward pass, which gathers it again."""
        if self.ranks > 1 and self.sequence:
            return _columns(x, kernels, self.axis)
        x = self.enter(x)
        return tuple(x @ kernel for kernel in kernels)

    def leave(self, x: Float[Array, "batch sequence hidden"]) -> Float[Array, "batch part hidden"]:
        """The sum of what row-parallel maps give."""
        if self.ranks == 1:
            return x
        return _scatter(x, self.axis) if self.sequence else _sum(x, self.axis)

    def enter_whole(self, x: Array) -> Array:
        """What every rank has, and reads a part of: the gradients of the parts are added up."""
        return x if self.ranks == 1 else _copy(x, self.axis)

    def sum(self, x: Array) -> Array:
        """Sum over the ranks; every rank gets the gradient of its own part."""
        return x if self.ranks == 1 else _sum(x, self.axis)

    def largest(self, x: Array) -> Array:
        """Maximum over the ranks, without a gradient."""
        x = lax.stop_gradient(x)
        return x if self.ranks == 1 else lax.pmax(x, self.axis)

    def whole_context(self, x: Float[Array, "batch part *rest"]) -> Array:
        """The keys, or values, of all parts of the sequence; the gradients of a part are summed."""
        return x if self.context == 1 else _gather(x, self.context_axis)

    @property
    def rank(self) -> Array | int:
        return 0 if self.ranks == 1 else lax.axis_index(self.axis)

    @property
    def context_rank(self) -> Array | int:
        return 0 if self.context == 1 else lax.axis_index(self.context_axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _copy(x, axis):
    return x


_copy.defvjp(lambda x, axis: (x, None), lambda axis, _, g: (lax.psum(g, axis),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum(x, axis):
    return lax.psum(x, axis)


_sum.defvjp(lambda x, axis: (lax.psum(x, axis), None), lambda axis, _, g: (g,))


def _all_gather(x, axis):
    return lax.all_gather(x, axis, axis=1, tiled=True)


def _reduce_scatter(x, axis):
    return lax.psum_scatter(x, axis, scatter_dimension=1, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x, axis):
    return _all_gather(x, axis)


_gather.defvjp(
    lambda x, axis: (_all_gather(x, axis), None),
    lambda axis, _, g: (_reduce_scatter(g, axis),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scatter(x, axis):
    return _reduce_scatter(x, axis)


_scatter.defvjp(
    lambda x, axis: (_reduce_scatter(x, axis), None),
    lambda axis, _, g: (_all_gather(g, axis),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _columns(x, kernels, axis):
    whole = _all_gather(x, axis)
    return tuple(whole @ kernel for kernel in kernels)


def _columns_backward(axis, kept, gradients):
    x, kernels = kept
    whole = _all_gather(x, axis)
    back = sum(g @ kernel.T for g, kernel in zip(gradients, kernels, strict=True))
    to_kernels = tuple(jnp.einsum("bsi,bso->io", whole, g) for g in gradients)
    return _reduce_scatter(back, axis), to_kernels


_columns.defvjp(
    lambda x, kernels, axis: (_columns(x, kernels, axis), (x, kernels)), _columns_backward
)
