"""A layer's backward pass in another place than its forward pass: what is kept between them.

    y, saved = forward(params, x)        d params, d x = both(params, saved, d y)

`saved` are the residuals of `jax.vjp` that are no parameters, nor made of nothing, as zeros are:
these are made again. The backward pass may be taken apart
(ZB-H1, arXiv 2401.10241): first what gives the gradient of the input, then, from what that left in
`stashed`, the gradients of the parameters. Between them every operation runs once.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
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
        self._constants = _constants(lambda *given: self._residuals(*given)[1], params, x)
        self.saved: list[jax.ShapeDtypeStruct] = self._held(kept)
        self.stashed: list[jax.ShapeDtypeStruct] = []
        if apart:
            self._take_apart(params, self.saved, y)

    def forward(self, params: Tree, x: Array) -> tuple[Array, list[Array]]:
        """The result, and what `both` needs besides the parameters; nothing else is computed."""

        def needed(params, x):
            y, kept, _ = self._residuals(params, x)
            return y, self._held(kept)

        y, saved = without_unread(needed, params, x)
        return y, list(lax.optimization_barrier(saved))  # else XLA may keep what they are made of

    def both(self, params: Tree, saved: Sequence[Array], g: Array) -> tuple[Tree, Array]:
        """Gradients of the parameters and of the input, from that of the result."""
        known, places, tree = jax.tree.leaves(params), *self._from
        rest, number = iter(saved), itertools.count()
        leaves = []
        for place in places:
            if place is not None:
                leaves.append(known[place])
            else:
                made = self._constants.get(next(number))
                leaves.append(next(rest) if made is None else made())
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

    def _held(self, kept: list) -> list:
        """Of all residuals that are no parameters, those that are saved."""
        return [leaf for i, leaf in enumerate(kept) if i not in self._constants]

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


def _constants(fn: Callable, *args: Any) -> dict[int, Callable[[], Array]]:
    """Which of the arrays that `fn(*args)` lists depend on no argument, and what makes them."""
    closed = jax.make_jaxpr(fn)(*args)
    jaxpr = closed.jaxpr
    given, found = {*jaxpr.invars, *jaxpr.constvars}, {}
    for eqn in jaxpr.eqns:
        if given.intersection(v for v in eqn.invars if not isinstance(v, Literal)):
            given.update(eqn.outvars)
    for i, out in enumerate(jaxpr.outvars):
        if isinstance(out, Literal) or out in given:
            continue
        part = jaxpr.replace(
            invars=[], constvars=[], eqns=_needed(jaxpr.eqns, [out]), outvars=[out],
            debug_info=jaxpr.debug_info.with_unknown_names(),
        )  # fmt: skip
        make = jaxpr_as_fun(closed.replace(jaxpr=part, consts=[]))
        found[i] = lambda make=make: make()[0]
    return found


def _needed(equations: Sequence, outputs: Sequence) -> list:
    """The equations that some variables are made of, in order."""
    wanted, found = {v for v in outputs if not isinstance(v, Literal)}, []
    for eqn in reversed(equations):
        if wanted.intersection(eqn.outvars):
            found.append(eqn)
            wanted.update(v for v in eqn.invars if not isinstance(v, Literal))
    return found[::-1]
