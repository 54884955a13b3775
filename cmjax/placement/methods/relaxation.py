"""A layer's placement made continuous, so that the priced objective has a gradient.

Two relaxed choices, X[e, r] being the chance that expert e has a copy on rank r:

    copies   c[e]                                                        (sum to the slots)
    places   X[e, r] = 1 / (1 + exp(-θ[e, r] - α[e] - β[r]))             (between 0 and 1)

with α and β such that rows sum to c and columns to the slots of a rank: entropic assignment under
capacities, each rank holding an expert at most once. An even split sends X[e, r] / c[e] of expert
e's tokens to rank r. A uniform X is balanced and places nothing, so what is priced is a random
rounding of X: with loads a relative to a rank's mean, its tokens have mean and variance

    μ[w, r] = sum over e of a[w, e] / c[e] · X[e, r]
    v[w, r] = sum over e of (a[w, e] / c[e])² · X[e, r] · (1 - X[e, r])

and the slowest rank, taken as Gaussian, is expected to have no more than (Jensen's inequality, any
s > 0)

    top[w] = log( sum over r of exp(s μ[w, r] + s² v[w, r] / 2) ) / s.

The price at `top`, summed over layers, is weighted as the objective weighs the windows, softly
sorted (`Risk.slope`). What a token costs more on one rank than on another is left to the search
that follows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cmjax.placement.pricing import LayerTime

_TIE = 1e-3  # weight of the slowest rank's tokens where the price itself is flat


def relaxed_cost(
    places: Float[Array, "experts ranks"],
    copies: Float[Array, "experts"],
    loads: Float[Array, "windows experts"],
    unit: Float[Array, "windows"],
    sharpness: float | Array,
    *,
    price: LayerTime,
) -> Float[Array, "windows"]:
    """The price of one layer's relaxed plan, smooth in places and copies.

    Args:
      places: X, the chance of a copy of each expert on each rank.
      copies: c, the sum of its rows.
      loads: tokens of each expert over the mean tokens of a rank.
      unit: that mean, in tokens.
      sharpness: s; the larger, the nearer to the slowest rank.
      price: the priced layer.
    Returns: price over what a rank's mean tokens more would cost; 0 at perfect balance.
    """
    share = loads / copies
    spread = jnp.square(share) @ (places * (1 - places))
    exponent = sharpness * (share @ places) + 0.5 * sharpness**2 * spread
    top = jax.nn.logsumexp(exponent, axis=-1) / sharpness
    ranks = places.shape[1]

    def priced(tokens):
        return price(jnp.broadcast_to((tokens * unit)[:, None], (len(unit), ranks)))

    base = priced(jnp.ones_like(top))
    scale = jnp.maximum((priced(2 * jnp.ones_like(top)) - base).mean(), _TIE * base.mean())
    return (priced(top) - base) / scale + _TIE * top


def soft_places(
    theta: Float[Array, "experts ranks"],
    copies: Float[Array, "experts"],
    size: float | Array,
    alpha: Float[Array, "experts"],
    beta: Float[Array, "ranks"],
    *,
    sweeps: int,
) -> tuple[Float[Array, "experts ranks"], Float[Array, "experts"], Float[Array, "ranks"]]:
    """X with row sums `copies` and column sums `size`, and its α and β: Newton steps from given."""

    def chance(alpha, beta):
        return jax.nn.sigmoid(theta + alpha[:, None] + beta)

    def step(x, wanted, axis):
        total = x.sum(axis)
        # Where all is decided the curvature vanishes; a floor keeps the step sane.
        return jnp.clip((wanted - total) / ((x * (1 - x)).sum(axis) + 1e-3 * total), -1, 1)

    def sweep(_, fitted):
        alpha, beta = fitted
        alpha = alpha + step(chance(alpha, beta), copies, 1)
        return alpha, beta + step(chance(alpha, beta), size, 0)

    alpha, beta = jax.lax.fori_loop(0, sweeps, sweep, (alpha, beta))
    return chance(alpha, beta), alpha, beta


def project(
    slope: Float[Array, "experts ranks"], places: Float[Array, "experts ranks"], *, sweeps: int = 2
) -> Float[Array, "experts ranks"]:
    """∂cost/∂θ at fixed copies from ∂cost/∂X: α and β undo what changes a row's or column's sum."""
    weight = places * (1 - places) + 1e-9

    def sweep(_, slope):
        slope = slope - (weight * slope).sum(1, keepdims=True) / weight.sum(1, keepdims=True)
        return slope - (weight * slope).sum(0) / weight.sum(0)

    return weight * jax.lax.fori_loop(0, sweeps, sweep, slope)
