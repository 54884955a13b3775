"""What flows between the layers of an acoustic model: frames, and where they are in the utterance.

Offline, frames are whole utterances that start at 0. Streaming, they are one chunk, and a layer
that looks ahead gives its frames late: the first ones of a stream lie before the utterance, at
negative positions. Frames outside `[0, lengths)` are zero in both, which is what every convolution
sees beyond the edges of an utterance, so that both ways compute the same thing.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

UNKNOWN = 1 << 30  # length of an utterance that has not ended yet


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frames:
    """A batch of frames.

    Attributes:
      x: the frames.
      lengths: frames of the whole utterances.
      start: position of the first frame in them; the same for the batch.
    """

    x: Float[Array, "batch frames channels"]
    lengths: Int[Array, "batch"]
    start: Int[Array, ""]

    def masked(self) -> "Frames":
        """With zeros outside the utterances.

        What comes after a layer is compiled apart from it: XLA would copy a layer's last sums into
        every window that the next one reads, which takes longer to compile and to run.
        """
        at = self.start + jnp.arange(self.x.shape[1])
        inside = (at >= 0) & (at < self.lengths[:, None])
        x = jnp.where(inside[..., None], self.x, 0.0)
        return dataclasses.replace(self, x=lax.optimization_barrier(x))

    def strided(self, x: Float[Array, "batch frames channels"], stride: int, late: int = 0):
        """`x` as the frames that a layer of this stride makes of these, `late` frames behind."""
        return Frames(x, -(-self.lengths // stride), self.start // stride - late).masked()


def delay(
    line: Float[Array, "batch late channels"], x: Float[Array, "batch frames channels"]
) -> tuple[Float[Array, "batch late channels"], Float[Array, "batch frames channels"]]:
    """Push `x` into a delay line: (the line afterwards, what comes out)."""
    both = jnp.concatenate([line, x], axis=1)
    return both[:, x.shape[1] :], both[:, : x.shape[1]]


def lookback(kernel: int, low: int, stride: int, alignment: int) -> int:
    """Frames before a chunk that a convolution of `low` frames of left padding must remember.

    At least `kernel - 1`, and such that its outputs are late by a multiple of `alignment`.
    """
    step = stride * alignment
    return low + step * math.ceil((kernel - 1 - low) / step)
