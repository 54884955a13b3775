"""A layer's backward pass in another place than its forward pass: what is kept between them.

    y, saved = forward(params, x)        d params, d x = both(params, saved, d y)

`saved` are the residuals of `jax.vjp` that are no parameters. The backward pass may be taken apart
(ZB-H1, arXiv 2401.10241): first what gives the gradient of the input, then, from what that left in
`stashed`, the gradients of the parameters. Between them every operation runs once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Literal, jaxpr_as_fun
from jaxtyping import Array

Tree = Any


class Backward:
    """The passes of `fn(params, x) -> y`.

    Args:
      fn: a function of a pytree and an array, of an array.
      params, x: its arguments' shapes.
      apart: whether gradients of parameters are computed apart.
    """

    def __init__(self, fn: Callable, params: Tree, x: jax.ShapeDtypeStruct, *, apart: bool = False):
        self.fn, self.apart = fn, apart
        self._from: Any = None  # where every residual is from, and how they make a function

        def forward(params, x):
            y, leaves, self._from = self._residuals(params, x)
            return y, leaves

        y, kept = jax.eval_shape(forward, params, x)
        self.saved: list[jax.ShapeDtypeStruct] = kept
        self.stashed: list[jax.ShapeDtypeStruct] = []
        if apart:
            self._take_apart(params, kept, y)

    def forward(self, params: Tree, x: Array) -> tuple[Array, list[Array]]:
        """The result, and what `both` needs besides the parameters; nothing else is computed."""
        return without_unread(lambda *given: self._residuals(*given)[:2], params, x)

    def both(self, params: Tree, saved: Sequence[Array], g: Array) -> tuple[Tree, Array]:
        """Gradients of the parameters and of the input, from that of the result."""
        known, places, tree = jax.tree.leaves(params), *self._from
        rest = iter(saved)
        leaves = [next(rest) if place is None else known[place] for place in places]
        return jax.tree.unflatten(tree, leaves)(g)

    def inputs(self, params: Tree, saved: Sequence[Array], g: Array) -> tuple[Array, list[Array]]:
        """The gradient of the input, and what `weights` needs."""
        x, *stashed = self._inputs(*jax.tree.leaves((params, list(saved), g)))
        return x, stashed

    def weights(self, params: Tree, saved: Sequence[Array], stashed: Sequence[Array]) -> Tree:
        """Gradients of the parameters."""
        found = self._weights(*jax.tree.leaves((params, list(saved), list(stashed))))
        return jax.tree.unflatten(jax.tree.structure(params), found)

    def _residuals(self, params: Tree, x: Array):
        y, back = jax.vjp(self.fn, params, x)
        leaves, tree = jax.tree.flatten(back)
        known = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves(params))}
        places = [known.get(id(leaf)) for leaf in leaves]
        kept = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
        return y, kept, (places, tree)

    def _take_apart(self, params: Tree, saved: list, y: jax.ShapeDtypeStruct) -> None:
        closed = jax.make_jaxpr(self.both)(params, saved, y)
        jaxpr = closed.jaxpr
        *weights, x = jaxpr.outvars
        *given, g = jaxpr.invars
        first = _needed(jaxpr.eqns, [x])
        second = [eqn for eqn in _needed(jaxpr.eqns, weights) if eqn not in first]
        made = {v for eqn in first for v in eqn.outvars} | {g}
        read = [v for eqn in second for v in eqn.invars if not isinstance(v, Literal)]
        read += [v for v in weights if not isinstance(v, Literal)]
        cut = list(dict.fromkeys(v for v in read if v in made))
        self.stashed = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in cut]

        def program(invars, eqns, outvars):
            part = jaxpr.replace(
                invars=invars,
                outvars=outvars,
                eqns=eqns,
                debug_info=jaxpr.debug_info.with_unknown_names(),
            )
            return jaxpr_as_fun(closed.replace(jaxpr=part))

        self._inputs = program([*given, g], first, [x, *cut])
        self._weights = program([*given, *cut], second, weights)


def without_unread(fn: Callable, *args: Any) -> Any:
    """`fn(*args)`, but for what nothing of the result is made of: `jax.vjp` traces a whole forward
    pass, of which a linear function's backward pass reads nothing."""
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    jaxpr = closed.jaxpr
    used = jaxpr.replace(
        eqns=_needed(jaxpr.eqns, jaxpr.outvars), debug_info=jaxpr.debug_info.with_unknown_names()
    )
    found = jaxpr_as_fun(closed.replace(jaxpr=used))(*jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shape), found)


def _needed(equations: Sequence, outputs: Sequence) -> list:
    """The equations that some variables are made of, in order."""
    wanted, found = {v for v in outputs if not isinstance(v, Literal)}, []
    for eqn in reversed(equations):
        if wanted.intersection(eqn.outvars):
            found.append(eqn)
            wanted.update(v for v in eqn.invars if not isinstance(v, Literal))
    return found[::-1]
