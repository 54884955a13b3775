"""Linear layers in every format of `Arithmetic`.

INT8 (W8A8) follows CloudMatrix384 paper section 4.5: activations get one dynamic scale per token,
weights one static scale per output channel, and the product runs in integers:

    y[t, n] = (sum_k xq[t, k] wq[k, n]) * x_scale[t] * w_scale[n]

Weights of multi-scale products lie as `msd_dot` reads them, the contracted dimension last.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int8

from cmjax.models.moe.arithmetic import EXPERT_FORMATS, FLOATS, ExpertFormat
from cmjax.models.moe.layers.initial import normal
from cmjax.primitives.exchange import quantize_rows
from cmjax.primitives.grouped import stacked_dot
from cmjax.primitives.int4 import Int4Weight, quantize_int4
from cmjax.primitives.msd import QuantizedWeight, WeightFormat, msd_dot, quantize_weight
from cmjax.program.mark import fused

_MSD: dict[str, WeightFormat] = {"msd_w8a16": "int8", "msd_w4a16": "mxfp4"}
Observer = Callable[[str, Array], None]
_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar(
    "observer", default=None
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """A matrix `[..., in, out]`: floating point with `scale=None`, or int8 steps of `scale`; or a
    `QuantizedWeight` for multi-scale products, or an `Int4Weight`. And what is added to the
    product."""

    value: Array | QuantizedWeight | Int4Weight
    scale: Float32[Array, "... out"] | None
    bias: Float[Array, "... out"] | None = None
    name: str = dataclasses.field(default="", metadata={"static": True})

    @property
    def columns(self) -> Any:
        """Width of the product."""
        if isinstance(self.value, QuantizedWeight):
            return self.value.values.shape[-2]
        if isinstance(self.value, Int4Weight):
            return self.value.packed.shape[-1]
        return self.value.shape[-1]


def matmul(x: Float[Array, "*batch k"], weight: Weight) -> Float[Array, "*batch n"]:
    """`x @ weight + bias` in the weight's format; result in the dtype of `x`."""
    return products(x, weight)[0]


def products(x: Float[Array, "*batch k"], *weights: Weight) -> tuple[Float[Array, "*batch n"], ...]:
    """`matmul` of one input and several matrices, for which it is quantized once."""
    for weight in weights:
        observe(weight.name, x)
    quantized = None
    if any(weight.scale is not None for weight in weights):
        quantized = fused("DynamicQuant")(quantize_rows)(x)
    return tuple(_product(x, quantized, weight) for weight in weights)


def _product(x, quantized, weight: Weight):
    if isinstance(weight.value, QuantizedWeight):
        return msd_dot(x, weight.value, bias=weight.bias)
    assert not isinstance(weight.value, Int4Weight), "experts alone are in four bits"
    if weight.scale is None:
        y = stacked_dot(x, weight.value.astype(x.dtype))
    else:
        y = _quant_matmul(x.dtype)(*quantized, weight.value, weight.scale)
    return y if weight.bias is None else y + weight.bias.astype(x.dtype)


@functools.cache
def _quant_matmul(dtype: Any) -> Callable:
    @fused("QuantMatmul")
    def kernel(steps, x_scale, w_steps, w_scale):
        total = stacked_dot(steps, w_steps)
        return (total.astype(jnp.float32) * x_scale[..., None] * w_scale).astype(dtype)

    return kernel


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Hand the inputs of every named matrix to `observer(name, x)`: for calibration, which runs
    without `jit` so that it sees values."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def observed() -> bool:
    """Whether there is an observer."""
    return _observer.get() is not None


def observe(name: str, x: Array) -> None:
    """Tell the observer, if there is one, that `x` goes into the matrix `name`."""
    observer = _observer.get()
    if observer is not None and name:
        observer(name, x)


def quantize_columns(
    value: Float[Array, "*stack k n"],
) -> tuple[Int8[Array, "*stack k n"], Float32[Array, "*stack n"]]:
    """INT8 with one scale per output channel (the last axis), `max|w| / 127`."""
    steps, scale = quantize_rows(jnp.swapaxes(value, -1, -2))
    return jnp.swapaxes(steps, -1, -2), scale


class Linear(nnx.Module):
    """`y = x W + b`.

    Parameters: floats: `weight [in, out]`; w8a8: int8 `weight [in, out]` and `scale [out]`; MSD:
    `values [out, in]` (MXFP4: `[out, in / 2]`, two codes a byte) and `scale`, as in
    `QuantizedWeight`; w4a8: uint8 `weight [in / 2, out]`, two steps a byte, and
    `scale [groups, out]`. With `bias`: float32 `bias [out]`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        format: ExpertFormat,
        rngs: nnx.Rngs,
        stack: tuple[int, ...] = (),
        bias: bool = False,
    ):
        if format not in EXPERT_FORMATS:
            known = ", ".join(EXPERT_FORMATS)
            raise ValueError(f"Linear: format must be one of {known}, got {format!r}")
        shape = (*stack, inputs, outputs)
        value = normal(rngs.params(), shape) * inputs**-0.5
        self.format, self.name = format, ""
        held = {name: nnx.Param(x) for name, x in encode_weight(value, format).items()}
        self.weight, self.values, self.scale = map(held.get, ("weight", "values", "scale"))
        self.bias = nnx.Param(jnp.zeros((*stack, outputs), jnp.float32)) if bias else None

    @property
    def matrix(self) -> Weight:
        """The parameters as a pytree, to hand to a kernel."""
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        if self.values is None:
            assert self.weight is not None, "one of the two is there"
            if self.format == "w4a8":
                assert scale is not None, "few-bit values have scales"
                return Weight(Int4Weight(self.weight[...], scale), None, bias, self.name)
            return Weight(self.weight[...], scale, bias, self.name)
        assert scale is not None, "few-bit values have scales"
        form = _MSD[self.format]
        group = 32 if form == "mxfp4" else None
        value = QuantizedWeight(values=self.values[...], scale=scale, format=form, group_size=group)
        return Weight(value, None, bias, self.name)

    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        return matmul(x, self.matrix)


def encode_weight(
    value: Float[Array, "*stack k n"],
    format: ExpertFormat,
    importance: Float32[Array, "*stack k"] | None = None,
) -> dict[str, Array]:
    """The parameters of a `Linear` in `format`.

    Args:
      value: the float matrix.
      importance: mean square of every input, to choose int8 steps by (`clipped_scale`); `None`:
        the step is `max|w| / 127`. Those of four bits are `max|w| / 7` always.
    """
    if format in FLOATS:
        return {"weight": value.astype(format)}
    value = value.astype(jnp.float32)
    if format == "msd_w4a16":
        packed = quantize_weight(jnp.swapaxes(value, -1, -2), format="mxfp4")
        return {"values": packed.values, "scale": packed.scale}
    if format == "w4a8":
        packed, scale = quantize_int4(value)
        return {"weight": packed, "scale": scale}
    if importance is None:
        steps, scale = quantize_columns(value)
    else:
        scale = clipped_scale(value, importance)
        steps = _steps(value, scale).astype(jnp.int8)
    if format == "w8a8":
        return {"weight": steps, "scale": scale}
    return {"values": jnp.swapaxes(steps, -1, -2), "scale": scale}


def clipped_scale(
    value: Float32[Array, "*stack k n"], importance: Float32[Array, "*stack k"]
) -> Float32[Array, "*stack n"]:
    """Step per output channel that gives its output the least error.

        min over c in {1, 0.98, ..., 0.6} of sum_k E[x_k^2] (w_kn - s clip(round(w_kn / s)))^2,
        s = c max|w_n| / 127

    The error of an output with uncorrelated inputs; a finer step for all weights is bought by
    clipping the largest (the offline scale search of CloudMatrix384's recipe).
    """
    largest = jnp.maximum(jnp.max(jnp.abs(value), axis=-2), 1e-12) / 127

    def error(scale):
        rounded = _steps(value, scale) * scale[..., None, :]
        return jnp.sum(importance[..., None] * jnp.square(value - rounded), axis=-2)

    best, least = largest, error(largest)
    for ratio in range(98, 58, -2):
        scale = largest * (ratio / 100)
        found = error(scale)
        best, least = jnp.where(found < least, scale, best), jnp.minimum(found, least)
    return best


def _steps(value, scale):
    return jnp.clip(jnp.round(value / scale[..., None, :]), -127, 127)


def quantize_params(
    params: dict[str, Any],
    like: dict[str, Any],
    importance: dict[str, Array] | None = None,
) -> dict[str, Any]:
    """Parameters of a float module for the same module in another arithmetic.

    Args:
      params: parameters of the float module (nested dict, as `nnx.to_pure_dict` gives); sharded
        ones, with a leading axis of ranks, stay where they are.
      like: parameters, or shapes, of the module to fill (of one rank); says formats and dtypes.
      importance: mean squares of inputs by path (`encode_weight`), as calibration gives.
    Raises:
      ValueError: the trees do not match; names the path.
    """
    return _convert(params, like, "", importance or {})


def _convert(params: Any, like: Any, path: str, importance: dict[str, Array]) -> Any:
    if not isinstance(like, dict):
        if like.shape not in (params.shape, params.shape[1:]):
            raise ValueError(
                f"quantize_params: {path} has shape {params.shape}, expected {like.shape}"
            )
        return params.astype(like.dtype)
    if "scale" in like and "weight" in params and "scale" not in params:
        value = params["weight"]
        matrix = encode_weight(value, format_of(like), importance.get(path))
        params = {key: x for key, x in params.items() if key != "weight"} | matrix
    if set(params) != set(like):
        raise ValueError(
            f"quantize_params: {path or 'the module'} has parameters {sorted(map(str, params))}, "
            f"expected {sorted(map(str, like))}"
        )
    return {key: _convert(params[key], like[key], f"{path}/{key}", importance) for key in like}


def format_of(like: dict[str, Any]) -> ExpertFormat:
    """The format of a `Linear` with scales, of its parameters or their shapes."""
    if "weight" in like:
        return "w4a8" if like["weight"].dtype == jnp.uint8 else "w8a8"
    return "msd_w4a16" if like["values"].dtype == jnp.uint8 else "msd_w8a16"
