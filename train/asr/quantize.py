"""From a float32 network to integers: which algorithm where, and steps from samples.

Layers with a stride or one tap and the last layer are direct, all others take a short algorithm.
How the integer ranges of those are chosen, and which of their steps learn, has four forms, compared
in `studies.rsq_asr`:

    per-tap   a step for every point of the transform; inputs as fine as an exact transform allows
    scaled    transformed integers stay as they are and may saturate; the input range R is the one
              of the least squared error, beyond what is safe: range scaling in its plain form
    safe      the same with the R that never saturates
    naive     one step for all points, one for the whole filter, from int8 inputs
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cmjax.models.asr.acoustic import AcousticModel, layer_algorithms
from cmjax.models.asr.conv import Conv, Precision, Requantize
from cmjax.primitives.convolution import ALGORITHMS, ConvScales, winograd_conv1d
from cmjax.primitives.convolution import calibrate as calibrate_conv
from train.asr.config import Ranges
from train.asr.learner import features_of
from train.data.batches import Batch, Framing

_REQUANTIZE: dict[Ranges, Requantize] = {
    "per-tap": "free",
    "scaled": "none",
    "safe": "none",
    "naive": "tied",
}
_SCALED = (1.0, 1.2, 1.4, 1.7, 2.0, 2.5)  # multiples of the safe range that are tried


def calibrate(
    model: AcousticModel,
    batches: Sequence[Batch],
    framing: Framing,
    precision: Precision,
    *,
    algorithm: str = "auto",
    ranges: Ranges = "per-tap",
) -> None:
    """Give every convolution of a float32 model scales, and switch it to integers.

    Args:
      model: trained in float32; changed in place.
      batches: samples; those of the most frequent length are used.
      framing: front end.
      precision: "int8" or "int8-winograd".
      algorithm: of the layers that are not direct; "auto" chooses per layer.
      ranges: see the module.
    Raises:
      ValueError: an algorithm that does not serve a layer's taps.
    """
    model.switch("float32")
    inputs = layer_inputs(model, batches, framing)
    forms = layer_algorithms(model, precision, algorithm)
    for conv, x, form in zip(model.convolutions(), inputs, forms, strict=True):
        own = "per-tap" if form == "direct" else ranges
        conv.set_scales(scales_of(conv, x, form, own), requantize=_REQUANTIZE[own])
    model.switch(precision)


def layer_inputs(
    model: AcousticModel, batches: Sequence[Batch], framing: Framing
) -> list[Float[Array, "batch frames cin"]]:
    """What every convolution is given, for the batches of the most frequent length."""
    sizes = [batch.samples.shape[1] for batch in batches]
    common = max(sorted(set(sizes)), key=sizes.count)
    seen = []
    for batch in batches:
        if batch.samples.shape[1] == common:
            inputs: list[Array] = []
            features, lengths = features_of(batch, framing)
            model(features, lengths, watch=lambda conv, x, y: inputs.append(x.x))  # noqa: B023
            seen.append(inputs)
    return [jnp.concatenate(parts) for parts in zip(*seen, strict=True)]


def scales_of(conv: Conv, x: Array, algorithm: str, ranges: Ranges) -> ConvScales:
    """Scales of one convolution for inputs like `x`."""
    kernel, padding = conv.kernel[...], conv.padding(x.shape[1])
    common: dict[str, Any] = {"algorithm": algorithm, "stride": conv.stride, "padding": padding}
    if ranges == "per-tap":
        return calibrate_conv(x, kernel, **common)
    if ranges == "naive":
        return calibrate_conv(x, kernel, **common, input_limit=127, method="max")
    safe = ALGORITHMS[algorithm].safe_range(127)
    if safe < 1:
        raise ValueError(
            f"calibrate: {algorithm} enlarges inputs by {ALGORITHMS[algorithm].growth}, no integer "
            f"is safe; ranges={ranges!r} needs a smaller algorithm, or use 'per-tap'"
        )
    exact = winograd_conv1d(x, kernel, algorithm="direct", stride=conv.stride, padding=padding)
    best, least = None, jnp.inf
    for factor in _SCALED if ranges == "scaled" else (1.0,):
        limit = min(127, round(factor * safe))
        scales = calibrate_conv(x, kernel, **common, requantize="none", input_limit=limit)
        y = winograd_conv1d(x, kernel, stride=conv.stride, padding=padding, scales=scales)
        error = float(jnp.square(y - exact).sum())
        if error < least:
            best, least = scales, error
    assert best is not None  # the first error is finite
    return best


def layer_sqnr_db(model: AcousticModel, batches: Sequence[Batch], framing: Framing) -> list[float]:
    """Of every convolution in integers: signal to noise against float32 on the same input, dB."""
    total: list[tuple[float, float]] = [(0.0, 0.0)] * len(model.convolutions())
    for batch in batches:
        records = []
        features, lengths = features_of(batch, framing)
        model(
            features,
            lengths,
            watch=lambda conv, x, y: records.append(conv.record(x, y, count_saturation=False)),  # noqa: B023
        )
        total = [
            (error + float(r.error), power + float(r.power))
            for (error, power), r in zip(total, jax.device_get(records), strict=True)
        ]
    return [float(10 * jnp.log10(power / error)) for error, power in total]
