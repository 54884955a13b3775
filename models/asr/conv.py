"""One 1-D convolution of an acoustic model with its activation, in floating point or integers.

    float32         y = act(x * W + b)
    int8            direct convolution with int8 operands
    int8-winograd   int8 operands in the domain of a short algorithm, one step per point

The integer forms are `cmjax.primitives.convolution.winograd`: one pipeline for training and for
deployment, so a trained network is deployed by `pack`ing its filters, and gives the same integers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from cmjax.models.asr.frames import Frames, lookback
from cmjax.primitives.convolution import (
    ALGORITHMS,
    ConvScales,
    PackedConv,
    prepack,
    saturation,
    winograd_conv1d,
)

Precision = Literal["float32", "int8", "int8-winograd"]
PRECISIONS = ("float32", "int8", "int8-winograd")
Requantize = Literal["free", "none", "tied"]


class Scale(nnx.Param):
    """A step of quantization: positive, learned at a pace of its own."""


class Packed(nnx.Variable):
    """A filter of integers, ready for the kernels; not trained."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """What a quantized layer saw of a batch, as sums over the frames of its utterances.

    Attributes:
      error: squared distance of its output from that of the same layer in float32.
      power: squared float32 output.
      excess: by how much transformed values leave the integer range, in units of it.
      count: transformed values.
    """

    error: Float[Array, ""]
    power: Float[Array, ""]
    excess: Float[Array, ""]
    count: Float[Array, ""]


class Conv(nnx.Module):
    """`y_t = act(b + sum_j x_{stride t - low + j} W_j)`, low = (kernel - 1) // 2, zeros outside.

    `act(y) = max(y, slope y)`: slope 1 is none, 0 is ReLU. Frames: `ceil(frames / stride)`.
    Parameters: `kernel [taps, cin, cout]`, `bias [cout]`; once calibrated the steps of `ConvScales`
    as far as they learn, by how the values of a transform become operands (`requantize`):

        free    input_step [], point_step [points], filter_step [points, cout]
        none    input_step [],                      filter_step [points, cout]: point steps stay 1
        tied    input_step [], point_step [],       filter_step []: one for all points
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        *,
        kernel: int,
        stride: int = 1,
        slope: float = 1.0,
        rngs: nnx.Rngs,
    ):
        gain = (2 / (1 + slope**2)) ** 0.5
        shape = (kernel, cin, cout)
        scale = gain * (kernel * cin) ** -0.5
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(cout))
        self.cin, self.cout, self.taps = cin, cout, kernel
        self.stride, self.slope = stride, slope
        self.precision: Precision = "float32"
        self.algorithm: str | None = None
        self.input_limit = 0
        self.requantize: Requantize = "free"

    @property
    def low(self) -> int:
        """Zeros in front of an utterance."""
        return (self.taps - 1) // 2

    @property
    def tile(self) -> int:
        """Outputs that are computed together."""
        if self.precision == "float32" or self.algorithm is None:
            return 1
        return ALGORITHMS[self.algorithm].m

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the direct form per output frame."""
        return self.taps * self.cin * self.cout

    @property
    def scales(self) -> ConvScales:
        """The steps. Raises ValueError before `set_scales`."""
        if self.algorithm is None:
            raise ValueError("Conv: no scales yet; calibrate before switching to integers")
        points = ALGORITHMS[self.algorithm].n
        kept = jnp.ones(()) if self.requantize == "none" else self.point_step[...]
        return ConvScales(
            input_step=self.input_step[...],
            point_step=jnp.broadcast_to(kept, (points,)),
            filter_step=jnp.broadcast_to(self.filter_step[...], (points, self.cout)),
            algorithm=self.algorithm,
            domain="int8",
            input_limit=self.input_limit,
        )

    def set_scales(self, scales: ConvScales, *, requantize: Requantize = "free") -> None:
        """Quantize with these from now on, once switched to integers.

        Args:
          scales: with `requantize="none"` all point steps are 1.
          requantize: which of them learn; "tied" takes the largest of the points' steps for all.
        """
        tied = requantize == "tied"
        if hasattr(self, "point_step"):  # of scales before these
            del self.point_step
        self.input_step = Scale(jnp.asarray(scales.input_step))
        self.filter_step = Scale(scales.filter_step.max() if tied else scales.filter_step)
        if requantize != "none":
            self.point_step = Scale(scales.point_step.max() if tied else scales.point_step)
        self.algorithm, self.input_limit = scales.algorithm, scales.input_limit
        self.requantize = requantize

    def switch(self, precision: Precision) -> None:
        """Compute in `precision` from now on.

        Raises: ValueError for an unknown one, or for integers without scales for them.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if precision != "float32" and self.algorithm is None:
            raise ValueError(f"switch: {precision} needs scales; calibrate first")
        if precision == "int8" and self.algorithm != "direct":
            raise ValueError(
                f"switch: int8 is direct convolution, and the scales are of {self.algorithm}; "
                "calibrate for int8"
            )
        self.precision = precision

    def prepare_scales(
        self, algorithm: str, input_limit: int, *, requantize: Requantize = "free"
    ) -> None:
        """Steps of 1 in the shapes of an algorithm, to be filled."""
        points = ALGORITHMS[algorithm].n
        self.set_scales(
            ConvScales(
                input_step=jnp.ones(()),
                point_step=jnp.ones(points),
                filter_step=jnp.ones((points, self.cout)),
                algorithm=algorithm,
                domain="int8",
                input_limit=input_limit,
            ),
            requantize=requantize,
        )

    def pack(self, *, for_kernels: bool | None = None) -> None:
        """Quantize the filter once and for all; the layer computes the same integers as before.

        Args:
          for_kernels: lay it out for the C++ kernels; by default if they are enabled.
        """
        if self.precision != "float32":
            packed = prepack(self.kernel[...], self.scales, stride=self.stride, packed=for_kernels)
            self.packed = Packed(packed)

    def convolutions(self) -> list["Conv"]:
        return [self]

    def __call__(self, frames: Frames, *, watch: "Watch | None" = None) -> Frames:
        x = frames.x
        valid_range = frames.valid_range(self.stride)
        y = frames.strided(self._convolve(x, self.padding(x.shape[1]), valid_range), self.stride)
        if watch is not None:
            watch(self, frames, y)
        return y

    def padding(self, length: int) -> tuple[int, int]:
        """Zeros before and behind so many frames."""
        last = (-(-length // self.stride) - 1) * self.stride
        return self.low, last + self.taps - self.low - length

    def record(self, frames: Frames, y: Frames, *, count_saturation: bool = True) -> Record:
        """What happened to `frames` on the way to `y`; for layers in integers.

        Args:
          frames, y: input and output.
          count_saturation: count it; it costs another transform of the input.
        """
        x, padding = frames.x, self.padding(frames.x.shape[1])
        wanted = self._convolve(x, padding, frames.valid_range(self.stride), precision="float32")
        wanted = lax.stop_gradient(wanted)
        excess, count = jnp.zeros(()), 1
        if count_saturation:
            excess, count = saturation(
                x, self.scales, taps=self.taps, stride=self.stride, padding=padding
            )
        error, power = jnp.square(y.x - wanted).sum(), jnp.square(wanted).sum()
        return Record(error, power, excess, jnp.asarray(float(count)))

    def state(self, batch: int, alignment: int) -> Float[Array, "batch back cin"]:
        """What a stream remembers: the last input frames."""
        return jnp.zeros((batch, self._back(alignment), self.cin))

    def latency(self, alignment: int) -> int:
        """Output frames by which a stream is late."""
        return (self._back(alignment) - self.low) // self.stride

    def step(
        self, state: Float[Array, "batch back cin"], frames: Frames, alignment: int
    ) -> tuple[Float[Array, "batch back cin"], Frames]:
        """The next chunk, a multiple of `stride` frames."""
        chunk = frames.x.shape[1]
        both = jnp.concatenate([state, frames.x], axis=1)
        used = chunk - self.stride + self.taps
        latency = self.latency(alignment)
        y = self._convolve(both[:, :used], (0, 0), frames.valid_range(self.stride, latency))
        return both[:, chunk:], frames.strided(y, self.stride, latency)

    def _back(self, alignment: int) -> int:
        return lookback(self.taps, self.low, self.stride, alignment)

    def _convolve(
        self,
        x: Array,
        padding: tuple[int, int],
        valid_range: Array,
        precision: Precision | None = None,
    ) -> Array:
        """The formula on a signal, in the layer's precision or another."""
        packed = getattr(self, "packed", None)
        filter: PackedConv | Array = self.kernel[...]
        options: dict[str, Any] = {"stride": self.stride}
        if (precision or self.precision) == "float32":
            options["algorithm"] = "direct"
        elif packed is None:
            options["scales"] = self.scales
        else:
            filter = packed.get_value()
        y = winograd_conv1d(
            x,
            filter,
            padding=padding,
            bias=self.bias[...],
            activation=self.slope,
            valid_range=valid_range,
            **options,
        )
        return lax.optimization_barrier(y)  # as in `masked`


Watch = Callable[[Conv, Frames, Frames], None]
