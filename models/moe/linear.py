"""Linear layers in float32, bfloat16 or INT8 (W8A8).

INT8 follows CloudMatrix384 paper section 4.5: activations get one dynamic scale per token, weights
one static scale per output channel, and the product runs in integers:

    y[t, n] = (sum_k xq[t, k] wq[k, n]) * x_scale[t] * w_scale[n]
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int8

from cmjax.primitives.exchange import quantize_rows
from cmjax.program.mark import fused

Precision = Literal["float32", "bfloat16", "int8"]
PRECISIONS = ("float32", "bfloat16", "int8")


def activation_dtype(precision: Precision) -> Any:
    """dtype of the residual stream: float32 only in float32."""
    check_precision(precision)
    return jnp.float32 if precision == "float32" else jnp.bfloat16


def check_precision(precision: str) -> None:
    """Raise ValueError unless `precision` is one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """A matrix `[..., in, out]`: floating point with `scale=None`, or int8 steps of `scale`; and
    what is added to the product."""

    value: Array
    scale: Float32[Array, "... out"] | None
    bias: Float[Array, "... out"] | None = None


def matmul(x: Float[Array, "*batch k"], weight: Weight) -> Float[Array, "*batch n"]:
    """`x @ weight + bias` in the weight's precision; result in the dtype of `x`."""
    if weight.scale is None:
        y = jnp.matmul(x, weight.value.astype(x.dtype), preferred_element_type=x.dtype)
    else:
        steps, x_scale = fused("DynamicQuant")(quantize_rows)(x)
        y = _quant_matmul(x.dtype)(steps, x_scale, weight.value, weight.scale)
    return y if weight.bias is None else y + weight.bias.astype(x.dtype)


@functools.cache
def _quant_matmul(dtype: Any) -> Callable:
    @fused("QuantMatmul")
    def kernel(steps, x_scale, w_steps, w_scale):
        contract = (((steps.ndim - 1,), (0,)), ((), ()))
        total = lax.dot_general(steps, w_steps, contract, preferred_element_type=jnp.int32)
        return (total.astype(jnp.float32) * x_scale[..., None] * w_scale).astype(dtype)

    return kernel


def quantize_weight(
    value: Float[Array, "*stack k n"],
) -> tuple[Int8[Array, "*stack k n"], Float32[Array, "*stack n"]]:
    """INT8 with one scale per output channel, `max|w| / 127`."""
    steps, scale = quantize_rows(jnp.swapaxes(value, -1, -2))
    return jnp.swapaxes(steps, -1, -2), scale


class Linear(nnx.Module):
    """`y = x W + b`.

    Parameters: `weight [in, out]`, for int8 `scale [out]`, with `bias` float32 `bias [out]`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
        stack: tuple[int, ...] = (),
        bias: bool = False,
    ):
        check_precision(precision)
        shape = (*stack, inputs, outputs)
        value = jax.random.normal(rngs.params(), shape, jnp.float32) * inputs**-0.5
        scale = None
        if precision == "int8":
            value, scale = quantize_weight(value)
        elif precision == "bfloat16":
            value = value.astype(jnp.bfloat16)
        self.weight = nnx.Param(value)
        self.scale = None if scale is None else nnx.Param(scale)
        self.bias = nnx.Param(jnp.zeros((*stack, outputs), jnp.float32)) if bias else None

    @property
    def matrix(self) -> Weight:
        """The parameters as a pytree, to hand to a kernel."""
        return Weight(
            self.weight[...],
            None if self.scale is None else self.scale[...],
            None if self.bias is None else self.bias[...],
        )

    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        return matmul(x, self.matrix)


def quantize_params(params: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a float module for the same module in another precision.

    Args:
      params: parameters of the float module (nested dict, as `nnx.to_pure_dict` gives).
      like: parameters, or shapes, of the module to fill; says what is int8 and which dtypes.
    Raises:
      ValueError: the trees do not match; names the path.
    """
    return _convert(params, like, "")


def _convert(params: Any, like: Any, path: str) -> Any:
    if not isinstance(like, dict):
        if params.shape != like.shape:
            raise ValueError(
                f"quantize_params: {path} has shape {params.shape}, expected {like.shape}"
            )
        return params.astype(like.dtype)
    if {"weight", "scale"} <= set(like) and "scale" not in params:
        steps, scale = quantize_weight(params["weight"].astype(jnp.float32))
        params = params | {"weight": steps, "scale": scale}
    if set(params) != set(like):
        raise ValueError(
            f"quantize_params: {path or 'the module'} has parameters {sorted(map(str, params))}, "
            f"expected {sorted(map(str, like))}"
        )
    return {key: _convert(params[key], like[key], f"{path}/{key}") for key in like}
