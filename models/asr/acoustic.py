"""What every acoustic model here is: normalised features through a list of layers to CTC logits.

    layers: Frames -> Frames, offline;    (state, Frames) -> (state, Frames), streaming

Streaming gives exactly the frames of the whole utterance, `latency` of them late, for chunks of a
multiple of `chunk_multiple` feature frames. It holds for the integer pipelines too: chunks are
cut at multiples of every layer's tile, so that a value is in the same place of the same tile.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from cmjax.models.asr.conv import Conv, Precision, Watch
from cmjax.models.asr.frames import UNKNOWN, Frames, masked
from cmjax.primitives.convolution import ALGORITHMS, choose_algorithm

_FLOORS_DB = {"auto": None, "fast": 23.0}  # None: that of `choose_algorithm`


class Statistics(nnx.Variable):
    """Constants measured on the training data; not trained."""


class AcousticModel(nnx.Module):
    """Base of `ConvDFSMN` and `Wav2letter`; a subclass says its layers.

    Attributes:
      mean, scale: `[inputs]`, features become `(features - mean) * scale`.
      layers: modules with `__call__`, `state`, `step`, `stride` and `convolutions`.
    """

    def __init__(self, inputs: int, layers: list):
        self.mean = Statistics(jnp.zeros(inputs))
        self.scale = Statistics(jnp.ones(inputs))
        self.layers = nnx.List(layers)

    def __call__(
        self,
        features: Float[Array, "batch frames inputs"],
        lengths: Int[Array, "batch"],
        *,
        watch: Watch | None = None,
    ) -> tuple[Float[Array, "batch outputs labels"], Int[Array, "batch"]]:
        """Logits of whole utterances, and how many frames of them are an utterance's.

        Args:
          features: padded behind `lengths` by anything.
          lengths: feature frames of each utterance.
          watch: called by every convolution with itself, its input and its output.
        Raises:
          ValueError: features of another width.
        """
        frames = self._normalised(Frames(features, lengths, jnp.zeros((), jnp.int32)))
        for layer in self.layers:
            frames = layer(frames, watch=watch)
        return frames.x, frames.lengths

    def stream(self, batch: int = 1) -> Any:
        """State before the first chunk: a pytree of fixed shapes, to be carried by `step`."""
        states = [layer.state(batch, self.alignment) for layer in self.layers]
        return jnp.zeros((), jnp.int32), states

    def step(
        self,
        state: Any,
        features: Float[Array, "batch chunk inputs"],
        lengths: Int[Array, "batch"] | None = None,
    ) -> tuple[Any, Float[Array, "batch outputs labels"]]:
        """Logits of the next chunk, `latency` output frames late.

        Args:
          state: of `stream`, or of the last step.
          features: the next chunk, a multiple of `chunk_multiple` frames; at the end of an
            utterance anything behind it, for as long as it takes to get the last frames out.
          lengths: feature frames of each whole utterance, once known.
        Raises:
          ValueError: a chunk of another size.
        """
        position, states = state
        batch, chunk, _ = features.shape
        if chunk % self.chunk_multiple or not chunk:
            raise ValueError(
                f"step: a chunk must be a multiple of {self.chunk_multiple} frames, got {chunk}"
            )
        if lengths is None:
            lengths = jnp.full((batch,), UNKNOWN, jnp.int32)
        frames = self._normalised(Frames(features, lengths, position))
        after = []
        for layer, before in zip(self.layers, states, strict=True):
            now, frames = layer.step(before, frames, self.alignment)
            after.append(now)
        return (position + chunk, after), frames.x

    @property
    def stride(self) -> int:
        """Feature frames per output frame."""
        return math.prod(layer.stride for layer in self.layers)

    @property
    def alignment(self) -> int:
        """Every layer's tiles start at multiples of this."""
        tiles = math.lcm(*(conv.tile for conv in self.convolutions()))
        return math.lcm(tiles, self.stride)

    @property
    def chunk_multiple(self) -> int:
        """Chunks of a stream are multiples of so many feature frames."""
        return self.stride * self.alignment

    @property
    def latency(self) -> int:
        """Output frames by which a stream is late."""
        latency = 0
        for layer in self.layers:
            latency = latency // layer.stride + layer.latency(self.alignment)
        return latency

    @property
    def macs_per_frame(self) -> float:
        """Multiply-accumulates of all convolutions per output frame."""
        rates = [math.prod(b.stride for b in self.layers[i + 1 :]) for i in range(len(self.layers))]
        return float(
            sum(
                rate * conv.macs
                for layer, rate in zip(self.layers, rates, strict=True)
                for conv in layer.convolutions()
            )
        )

    def convolutions(self) -> list[Conv]:
        """Every convolution, from the features to the logits."""
        return [conv for layer in self.layers for conv in layer.convolutions()]

    def switch(self, precision: Precision) -> None:
        """Compute every convolution in `precision` from now on.

        Raises: ValueError for an unknown precision, or integers without scales.
        """
        for conv in self.convolutions():
            conv.switch(precision)

    def pack(self) -> None:
        """Deploy: quantize every filter once. The integers stay the same; training ends here."""
        for conv in self.convolutions():
            conv.pack()

    def set_statistics(
        self,
        mean: Float[Array | np.ndarray, "inputs"],
        deviation: Float[Array | np.ndarray, "inputs"],
    ) -> None:
        """Normalise features by these from now on."""
        self.mean[...] = jnp.asarray(mean, jnp.float32)
        self.scale[...] = 1.0 / jnp.maximum(jnp.asarray(deviation, jnp.float32), 1e-3)

    def _normalised(self, frames: Frames) -> Frames:
        inputs = self.mean[...].shape[0]
        if frames.x.shape[-1] != inputs:
            raise ValueError(
                f"{type(self).__name__}: features must have {inputs} bands, got "
                f"{frames.x.shape[-1]}"
            )
        x = (frames.x - self.mean[...]) * self.scale[...]
        return frames.strided(masked(x, frames.valid_range()), 1)


def layer_algorithms(
    model: AcousticModel, precision: Precision, algorithm: str = "auto"
) -> list[str]:
    """Which algorithm every convolution takes in integers.

    Layers with a stride or one tap and the last layer are direct, as all are in "int8"; others
    take `algorithm`: "auto" is the fastest that is accurate enough (`choose_algorithm`), "fast" the
    fastest down to an expected signal-to-noise ratio that training makes up for.

    Raises: ValueError for an unknown algorithm, or one that does not serve a layer's taps.
    """
    convolutions = model.convolutions()

    def of(conv: Conv) -> str:
        if precision == "int8" or conv is convolutions[-1] or conv.stride > 1 or conv.taps == 1:
            return "direct"
        if algorithm not in _FLOORS_DB:
            return algorithm
        floor = _FLOORS_DB[algorithm]
        return choose_algorithm(conv.taps, conv.cin, conv.cout, domain="int8", min_sqnr_db=floor)

    forms = [of(conv) for conv in convolutions]
    for conv, form in zip(convolutions, forms, strict=True):
        if form not in ALGORITHMS:
            raise ValueError(
                f"algorithm {form!r} is not one of auto, fast, {', '.join(ALGORITHMS)}"
            )
        ALGORITHMS[form].tap_blocks(conv.taps)  # raises if it does not serve so many taps
    return forms
