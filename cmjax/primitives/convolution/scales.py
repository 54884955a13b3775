"""Steps of a convolution's quantizers.

    x ~ input_step * xi,   B^T xi ~ point_step * v,   G w ~ filter_step * u

One step per input (or input channel), per point of the transform for signals, and per point and
output channel for filters: transformed values of different points differ in size by the growth of
their rows, and one step for all of them is what costs int8 Winograd its accuracy.
"""

import dataclasses

import jax
from jaxtyping import Array, Float32

from cmjax.primitives.convolution.rsq import check_steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvScales:
    """Steps of one convolution's quantizers; a pytree whose leaves may be learned.

    Fields:
      input_step: value of one integer of the input, scalar or [cin].
      point_step: how many input integers one operand is worth, per point, [points]; all 1 passes
        transformed integers on as they are (they saturate), powers of two are shifts.
      filter_step: value of one integer of the transformed filter, [points, cout]. With an
        `input_step` per channel, of the filter whose input channels are scaled by
        `input_step / max(input_step)`.
      algorithm: name in `toom_cook.ALGORITHMS`.
      domain: "int8" or "int16".
      input_limit: largest |integer| of the input, R.
      zero_point: the integer that stands for 0. The input is then of all the two's complement
        integers, -R-1 to R, and asymmetric; 0, the default, is the symmetric range -R to R.
    """

    input_step: Float32[Array, "*cin"]
    point_step: Float32[Array, "points"]
    filter_step: Float32[Array, "points cout"]
    algorithm: str = dataclasses.field(metadata={"static": True})
    domain: str = dataclasses.field(metadata={"static": True})
    input_limit: int = dataclasses.field(metadata={"static": True})
    zero_point: int = dataclasses.field(default=0, metadata={"static": True})


def check_scales(function: str, scales: ConvScales) -> None:
    """Refuse what is no scales, and scales that are known to be no positive numbers."""
    if not isinstance(scales, ConvScales):
        raise TypeError(f"{function}: scales must be ConvScales, as of calibrate, got {scales!r}")
    for field in ("input_step", "point_step", "filter_step"):
        check_steps(function, f"scales.{field}", getattr(scales, field))
