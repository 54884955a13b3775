"""One 1-D convolution of an acoustic model, with its activation."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from models.asr.frames import Frames, lookback

Precision = Literal["float32", "int8", "int8-winograd"]
PRECISIONS = ("float32", "int8", "int8-winograd")


class Scale(nnx.Param):
    """A step of quantisation: learned, but at a pace of its own."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """What a quantised layer saw of a batch, as sums over the frames of its utterances.

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
    Parameters: `kernel [taps, cin, cout]`, `bias [cout]`.
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

    @property
    def low(self) -> int:
        """Zeros in front of an utterance."""
        return (self.taps - 1) // 2

    @property
    def tile(self) -> int:
        """Outputs that are computed together."""
        return 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the direct form per output frame."""
        return self.taps * self.cin * self.cout

    def convolutions(self) -> list["Conv"]:
        return [self]

    def __call__(self, frames: Frames, *, record: list | None = None) -> Frames:
        length = frames.x.shape[1]
        out = -(-length // self.stride)
        high = (out - 1) * self.stride + self.taps - self.low - length
        return frames.strided(self._convolve(frames.x, (self.low, high)), self.stride)

    def state(self, batch: int, alignment: int) -> Float[Array, "batch back cin"]:
        """What a stream remembers: the last input frames."""
        return jnp.zeros((batch, self._back(alignment), self.cin))

    def late(self, alignment: int) -> int:
        """Output frames by which a stream is late."""
        return (self._back(alignment) - self.low) // self.stride

    def step(
        self, state: Float[Array, "batch back cin"], frames: Frames, alignment: int
    ) -> tuple[Float[Array, "batch back cin"], Frames]:
        """The next chunk, a multiple of `stride` frames."""
        chunk = frames.x.shape[1]
        both = jnp.concatenate([state, frames.x], axis=1)
        used = chunk - self.stride + self.taps
        y = self._convolve(both[:, :used], (0, 0))
        return both[:, chunk:], frames.strided(y, self.stride, self.late(alignment))

    def _back(self, alignment: int) -> int:
        return lookback(self.taps, self.low, self.stride, alignment)

    def _convolve(self, x: Array, padding: tuple[int, int]) -> Array:
        y = lax.conv_general_dilated(
            x,
            self.kernel[...],
            (self.stride,),
            [padding],
            dimension_numbers=("NTC", "TIO", "NTC"),
        )
        y = y + self.bias[...]
        return y if self.slope == 1 else jnp.maximum(y, self.slope * y)
