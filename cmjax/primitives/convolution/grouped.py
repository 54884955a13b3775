"""Products of a grouped convolution: every group of output channels sees its own input channels.

    y[t, g, o] = sum_k sum_c v[t, k, g, c] u[k, c, g, o]      k: folded frames of all tap blocks

One channel per group (depthwise) is no matrix product: there the sum over taps is element-wise.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Num


def grouped_products(
    v: Num[Array, "points batch tiles depth"],
    u: Num[Array, "points group_depth cout"],
    *,
    groups: int,
    channels: int,
    dtype,
) -> Num[Array, "points batch tiles cout"]:
    """The products, added up in `dtype`.

    Args:
      v: operands of the signal; depth is frames of all tap blocks times `channels`.
      u: operands of the filter; group_depth is depth / groups.
      groups: divides `channels` and cout.
      channels: of the signal, before frames were folded into them.
    """
    if groups == 1:
        return jnp.einsum(
            "pbtk,pko->pbto", v, u, preferred_element_type=dtype, precision=lax.Precision.HIGHEST
        )
    of_one = channels // groups
    frames = v.shape[-1] // channels
    v = v.reshape(*v.shape[:3], frames, groups, of_one)
    cout = u.shape[-1]
    u = u.reshape(u.shape[0], frames, of_one, groups, cout // groups)
    if of_one > 1:
        y = jnp.einsum(
            "pbtkgc,pkcgo->pbtgo",
            v,
            u,
            preferred_element_type=dtype,
            precision=lax.Precision.HIGHEST,
        )
    else:
        v, u = v.astype(dtype), u.astype(dtype)
        y = jnp.zeros((), dtype)
        for k in range(frames):
            y = y + v[:, :, :, k, :, :] * u[:, None, None, k, 0]
    return y.reshape(*y.shape[:3], cout)


def of_group(x: Array, group: int, *, groups: int, channels: int) -> Array:
    """The channels of one group of a folded signal [..., frames * channels]."""
    frames = x.shape[-1] // channels
    split = x.reshape(*x.shape[:-1], frames, groups, channels // groups)
    return split[..., group, :].reshape(*x.shape[:-1], x.shape[-1] // groups)
