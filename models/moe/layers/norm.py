"""RMS normalisation (Zhang and Sennrich 2019):  y = g * x / sqrt(mean(x^2) + eps)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from cmjax import native
from cmjax.models.moe.layers.few import is_few
from cmjax.primitives.define import define_call
from cmjax.program.mark import fused


def rms_norm(
    x: Float[Array, "*batch dim"], gain: Float[Array, "dim"], eps: float
) -> Float[Array, "*batch dim"]:
    """Normalise the last axis in float32, as one kernel; dtype of `x`.

    >>> y = rms_norm(jnp.array([3.0, 4.0]), jnp.ones(2), eps=0.0)
    >>> [round(float(value), 4) for value in y]
    [0.8485, 1.1314]
    """

    @fused("RMSNorm")
    def kernel(x, gain):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
        return (gain.astype(jnp.float32) * y).astype(x.dtype)

    return kernel(x, gain)


class RMSNorm(nnx.Module):
    """RMS normalisation with a learned gain."""

    def __init__(self, dim: int, eps: float, *, rngs: nnx.Rngs):
        self.gain = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        stages = functools.partial(rms_norm, eps=self.eps)
        if not is_few(x):
            return stages(x, self.gain[...])
        call = functools.partial(rms_norm_p.bind, eps=self.eps)
        return lax.platform_dependent(
            x, self.gain[...], cpu=lambda *operands: call(*operands)[0], default=stages
        )


def _reference(x, gain, *, eps):
    return [rms_norm(x, gain, eps)]


def _native(x, gain, *, eps):
    rows = x.reshape(-1, x.shape[-1])
    out = jax.ShapeDtypeStruct(rows.shape, rows.dtype)
    y = native.call("cmjax_rms_norm", out, rows, gain.astype(jnp.float32), eps=np.float32(eps))
    return [y.reshape(x.shape)]


rms_norm_p = define_call("cm_rms_norm", _reference, _native)
