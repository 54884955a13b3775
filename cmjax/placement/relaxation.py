"""A placement made continuous, so that the priced time has a gradient with respect to it.

Two relaxed choices per layer:

    copies   c[e]    = 1 + redundant · softmax(φ)[e]               (sums to the slots)
    places   X[e, r] = transport plan nearest to exp(θ/τ), with row sums c and column sums
                       slots_per_rank, by Sinkhorn's iteration (Cuturi, 2013)

An even split over copies sends X[e, r] / c[e] of expert e's tokens to rank r. The uniform X
balances perfectly and places nothing, so the price of the *mean* tokens is no guide. What is
descended is the expected price of a random rounding: each X[e, r] is the chance of a copy there,
which gives a rank's tokens the variance

    v[r] = sum over experts of (load[e] / c[e])² · X[e, r] · (1 - X[e, r]),

taken as Gaussian and averaged over samples. An undecided X is dear, a decided one is priced
exactly, and the falling temperature τ brings X to whole copies on ranks.

The price is piecewise: its gradient names only the slowest rank. The samples smooth it too
(randomised smoothing; Duchi, Bartlett and Wainwright, 2012), with a floor σ of their relative
size, and need nothing of the price but that it can be called.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cmjax.placement.pricing import LayerTime

_SINKHORN_ITERATIONS = 6
_FLOOR = -30.0  # exp(-30) places nothing, and its inverse square is still a single-precision number
_CROWDING = 0.1  # weight of a second copy on a rank, in units of the layer's time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RelaxedPlan:
    """What the optimiser moves, for one layer; leading axes are restarts and layers.

    Attributes:
      places: θ, the wish for expert e on rank r.
      copies: φ, the wish for copies of expert e.
    """

    places: Float[Array, "*batch experts ranks"]
    copies: Float[Array, "*batch experts"]


def soft_copies(plan: RelaxedPlan, slots: int) -> Float[Array, "*batch experts"]:
    """Fractional copies of each expert: at least one, `slots` in total."""
    redundant = slots - plan.copies.shape[-1]
    return 1 + redundant * jax.nn.softmax(plan.copies)


def soft_places(
    places: Float[Array, "experts ranks"],
    copies: Float[Array, "experts"],
    temperature: float | Array,
) -> Float[Array, "experts ranks"]:
    """Fractional copies of each expert on each rank; rows sum to `copies` exactly.

    Columns sum to the slots of a rank up to Sinkhorn's convergence: rows come last, so that no
    token is lost.
    """
    ranks = places.shape[-1]
    scaled = (places - places.max(-1, keepdims=True)) / temperature
    kernel = jnp.exp(jnp.maximum(scaled, _FLOOR))
    capacity = copies.sum() / ranks

    @jax.checkpoint
    def iterate(columns, _):
        rows = copies / (kernel @ columns)
        return capacity / (rows @ kernel), None

    columns, _ = jax.lax.scan(iterate, jnp.ones_like(kernel[0]), length=_SINKHORN_ITERATIONS)
    share = kernel * columns
    return copies[:, None] * share / share.sum(-1, keepdims=True)


def relaxed_cost(
    plan: RelaxedPlan,
    counts: Float[Array, "windows experts"],
    scale_s: float | Array,
    fixed_copies: Float[Array, "experts"],
    use_fixed: float | Array,
    temperature: float | Array,
    smoothing: float | Array,
    noise: Float[Array, "samples windows ranks"],
    *,
    slots: int,
    layer_time_s: LayerTime,
) -> Float[Array, ""]:
    """Expected price of rounding one layer's relaxed plan, relative to `scale_s`, over windows.

    Args:
      plan: relaxed plan of the layer.
      counts: tokens by window and expert.
      scale_s: seconds that count as one.
      fixed_copies: whole copies to use in place of the relaxed ones where `use_fixed` is 1.
      temperature: τ, above 0.
      smoothing: σ, least standard deviation of a rank's tokens relative to their mean, above 0.
      noise: standard normal samples; zeros give the price of the mean tokens.
      slots: physical slots of the layer.
      layer_time_s: the priced layer.
    """
    copies = use_fixed * fixed_copies + (1 - use_fixed) * soft_copies(plan, slots)
    placed = soft_places(plan.places, copies, temperature)
    tokens = counts @ (placed / copies[:, None])
    chance = jnp.clip(placed, 0, 1)
    variance = jnp.square(counts / copies) @ (chance * (1 - chance))
    floor = jnp.square(smoothing * tokens.mean(-1, keepdims=True))
    sampled = tokens + jnp.sqrt(variance + floor) * noise
    time_s = layer_time_s(sampled).mean()
    crowding = jnp.square(jax.nn.relu(placed - 1)).sum() / slots
    return time_s / scale_s + _CROWDING * crowding
