"""The activation of a gated feed-forward block (Shazeer 2020):  silu(gate) * up."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cmjax.program.mark import fused


def activate(h: Float[Array, "*batch two_ffn"]) -> Float[Array, "*batch ffn"]:
    """`silu(gate) * up` of the halves of the last axis, gate first.

    >>> activate(jnp.array([0.0, 100.0, 5.0, 0.5])).tolist()
    [0.0, 50.0]
    """
    gate, up = jnp.split(h, 2, axis=-1)
    return jax.nn.silu(gate) * up


@fused("SwiGLU")
def swiglu(h: Float[Array, "*batch two_ffn"]) -> Float[Array, "*batch ffn"]:
    """`activate` in float32, as one kernel; dtype of `h`."""
    return activate(h.astype(jnp.float32)).astype(h.dtype)
