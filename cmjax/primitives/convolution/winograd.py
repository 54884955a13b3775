"""One-dimensional convolution by short algorithms: float32, int8 and int16 operands.

    y = A^T [(G w) * (B^T x)]                 float32 (Winograd 1980; Lavin and Gray, 2016)
    y = A^T [scale * (u v)],  u, v integers   int8, int16: see `quantized_conv`

In the integer domains signals and filters are quantized *after* their transforms, each point with
a step of its own, as Yao et al. (arXiv:2010.14841) and MNN's engine need for int8 Winograd in
speech recognition. Called with a float filter and scales the function is differentiable in all of
them and its value is the deployed integer pipeline's, bit for bit: that is training with RSQ.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from cmjax.primitives.convolution.calibration import dynamic_scales
from cmjax.primitives.convolution.floating import TransformedConv, float_conv, untransformed
from cmjax.primitives.convolution.geometry import Padding
from cmjax.primitives.convolution.packed import PackedConv, integer_conv, quantizable
from cmjax.primitives.convolution.plan import plan_conv
from cmjax.primitives.convolution.scales import ConvScales


def winograd_conv1d(
    x: Float[Array, "batch length cin"],
    w: Float[Array, "taps of_group cout"] | PackedConv | TransformedConv,
    *,
    algorithm: str = "auto",
    domain: str | None = None,
    stride: int | None = None,
    padding: Padding = "SAME",
    dilation: int | None = None,
    groups: int | None = None,
    bias: Float[Array, "cout"] | None = None,
    activation: str | float | None = None,
    scales: ConvScales | None = None,
    min_sqnr_db: float | None = None,
    valid_range: Int32[Array, "batch 2"] | None = None,
) -> Float[Array, "batch out_length cout"]:
    """Convolution of `x` with `w`, as `lax.conv_general_dilated` has it, layout NWC x WIO -> NWC.

    Args:
      x: signals.
      w: the filter, or what `prepack` made of it. Without integers the convolution is computed in
        float64 if x or w has it.
      algorithm: a name in `toom_cook.ALGORITHMS`, or "auto" for `choose_algorithm` under
        `min_sqnr_db`; scales and packed filters carry their own. "direct" in float32 is
        `lax.conv_general_dilated`.
      domain: "float32", "int8" or "int16": operands of the products. Default: that of the scales or
        the packed filter, else float32.
      stride: any; folded into channels. Default 1, or that of the packed filter.
      padding: "SAME", "SAME_LOWER", "VALID", (low, high) or [(low, high)].
      dilation: as `rhs_dilation`; served by direct convolution. Default as for the stride.
      groups: groups of channels that do not meet, as `feature_group_count`; w is then
        [taps, cin / groups, cout]. As many as channels make a depthwise convolution. Default as for
        the stride.
      bias: added to the output.
      activation: None, "relu", or the slope of a leaky ReLU below zero.
      scales: of the integer domains, from `calibrate`. Without them each call takes its steps from
        the largest magnitudes of its own x and w.
      min_sqnr_db: accuracy floor of "auto", in dB.
      valid_range: first frame of each result that is no padding and the one behind its last,
        [start, stop), as the lengths of a padded batch say. The frames outside are zero. Default:
        all are valid.
    Returns: dtype of `x`.
      In the integer domains what is not finite gives NaN where it reaches: in x the frames whose
      taps meet it, in w its output channel. No other result depends on it. Float32 algorithms with
      tiles may spread it over a tile's frames.
    Raises: ValueError for shapes, names or numbers that cannot be served, saying what can;
      TypeError for operands that are not floating point.
    Gradient: of float32, the exact one; of the integer domains straight-through in `x`, `w` and
      `bias` (what saturates passes none) and LSQ's rule in the scales.
    Example: a moving sum over three frames, in float32 and in int8 products.

      >>> x, w = jnp.arange(6.0).reshape(1, 6, 1), jnp.ones((3, 1, 1))
      >>> winograd_conv1d(x, w, algorithm="direct").ravel().tolist()
      [1.0, 3.0, 6.0, 9.0, 12.0, 9.0]
      >>> y = winograd_conv1d(x, w, algorithm="F(2,3)", domain="int8")
      >>> y.shape, bool(jnp.abs(y.ravel() - jnp.array([1, 3, 6, 9, 12, 9])).max() < 0.2)
      ((1, 6, 1), True)
    """
    name, x = "winograd_conv1d", jnp.asarray(x)
    w = w if isinstance(w, PackedConv | TransformedConv) else jnp.asarray(w)
    bias = None if bias is None else jnp.asarray(bias)
    valid_range = None if valid_range is None else jnp.asarray(valid_range)
    plan = plan_conv(
        name,
        x,
        w if isinstance(w, Array) else w.plan,
        algorithm=algorithm,
        domain=domain,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
        activation=activation,
        scales=scales,
        min_sqnr_db=min_sqnr_db,
        valid_range=valid_range,
    )
    if not isinstance(w, Array):
        operands = w
    elif plan.filter.domain == "float32":
        operands = untransformed(w, plan.filter)
    else:
        scales = dynamic_scales(x, w, plan) if scales is None else scales
        operands = quantizable(w, scales, plan=plan.filter)
    if isinstance(operands, PackedConv):
        return integer_conv(x, operands, plan, bias=bias, valid_range=valid_range)
    return float_conv(x, operands, plan, bias=bias, valid_range=valid_range)


def int8_conv1d(
    x: Float[Array, "batch length cin"],
    w: Float[Array, "taps of_group cout"],
    *,
    stride: int = 1,
    padding: Padding = "SAME",
    dilation: int = 1,
    groups: int = 1,
    bias: Float[Array, "cout"] | None = None,
    activation: str | float | None = None,
    scales: ConvScales | None = None,
) -> Float[Array, "batch out_length cout"]:
    """Direct convolution with int8 operands: `winograd_conv1d` with algorithm "direct".

    The baseline that fast algorithms are measured against: one step for the input, one per output
    channel for the filter, exact int32 sums. Arguments as there.
    Example:

      >>> x, w = jnp.arange(6.0).reshape(1, 6, 1), jnp.ones((3, 1, 1))
      >>> int8_conv1d(x, w, activation="relu").round(1).ravel().tolist()
      [1.0, 3.0, 6.0, 9.0, 12.0, 9.0]
    """
    return winograd_conv1d(
        x,
        w,
        algorithm="direct",
        domain="int8",
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
        activation=activation,
        scales=scales,
    )
