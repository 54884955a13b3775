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

from cmjax.primitives.convolution import zero_padding_frames

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

    def valid_range(self, stride: int = 1, latency: int = 0) -> Int[Array, "batch 2"]:
        """Where the utterances lie in `strided` frames, [start, stop); the others are padding."""
        to = self.strided(self.x, stride, latency)
        return jnp.stack([jnp.broadcast_to(-to.start, to.lengths.shape), to.lengths - to.start], -1)

    def strided(
        self, x: Float[Array, "batch frames channels"], stride: int, latency: int = 0
    ) -> "Frames":
        """`x` as the frames that a layer of this stride makes of these, `latency` frames behind."""
        if stride == 1:
            return Frames(x, self.lengths, self.start - latency)
        return Frames(x, -(-self.lengths // stride), self.start // stride - latency)


def masked(
    x: Float[Array, "batch frames channels"], valid_range: Int[Array, "batch 2"]
) -> Float[Array, "batch frames channels"]:
    """`x` with zeros outside the utterances, for a layer that has computed it apart from others.

    What comes after a layer is compiled apart from it: XLA would copy a layer's last sums into
    every window that the next one reads, which takes longer to compile and to run.
    """
    return lax.optimization_barrier(zero_padding_frames(x, valid_range))


def delay(
    line: Float[Array, "batch delay channels"], x: Float[Array, "batch frames channels"]
) -> tuple[Float[Array, "batch delay channels"], Float[Array, "batch frames channels"]]:
    """Push `x` into a delay line: (the line afterwards, what comes out)."""
    both = jnp.concatenate([line, x], axis=1)
    return both[:, x.shape[1] :], both[:, : x.shape[1]]


def lookback(kernel: int, low: int, stride: int, alignment: int) -> int:
    """Frames before a chunk that a convolution of `low` frames of left padding must remember.

    At least `kernel - 1`, and such that its outputs are late by a multiple of `alignment`.
    """
    step = stride * alignment
    return low + step * math.ceil((kernel - 1 - low) / step)
