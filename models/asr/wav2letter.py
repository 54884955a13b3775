"""Wav2letter: a stack of 1-D convolutions to letters (Collobert et al., 2016).

The layer table is that of Arm's model zoo (`models/speech_recognition/wav2letter`):

    kernel 48 stride 2 -> 250;   7 x kernel 7 -> 250;   kernel 32 -> 2000;   1 -> 2000;   1 -> 29

with leaky ReLU 0.2 after all but the last: 23,594,529 parameters with 39 inputs.
"""

import dataclasses

from flax import nnx

from cmjax.models.asr.acoustic import AcousticModel
from cmjax.models.asr.conv import Conv

SLOPE = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wav2letterConfig:
    """Sizes; the defaults are the published ones."""

    first_kernel: int = 48
    """Taps of the first layer."""
    stride: int = 2
    """Stride of the first layer."""
    width: int = 250
    """Channels of the first layer and the stack."""
    kernel: int = 7
    """Taps in the stack."""
    depth: int = 7
    """Layers in the stack."""
    wide_kernel: int = 32
    """Taps of the layer behind the stack."""
    wide: int = 2000
    """Channels of it and of the layer behind it."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"Wav2letterConfig: {field.name} must be at least 1, got "
                    f"{getattr(self, field.name)}"
                )


class Wav2letter(AcousticModel):
    """Features to letters; see `AcousticModel` for what it does."""

    def __init__(self, config: Wav2letterConfig, *, inputs: int, outputs: int, rngs: nnx.Rngs):
        """Args: config; inputs, bands of the features; outputs, labels with the blank; rngs."""
        c = config
        shapes = [
            (inputs, c.width, c.first_kernel, c.stride),
            *[(c.width, c.width, c.kernel, 1)] * c.depth,
            (c.width, c.wide, c.wide_kernel, 1),
            (c.wide, c.wide, 1, 1),
        ]
        layers = [
            Conv(cin, cout, kernel=kernel, stride=stride, slope=SLOPE, rngs=rngs)
            for cin, cout, kernel, stride in shapes
        ]
        layers.append(Conv(c.wide, outputs, kernel=1, rngs=rngs))
        super().__init__(inputs, layers)
