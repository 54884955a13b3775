"""What a caller of a convolution can get wrong, said in the caller's words."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from cmjax.primitives.convolution.toom_cook import ALGORITHMS


def check_signal(function: str, x: Array, cin: int | None = None) -> None:
    """Refuse a signal of wrong rank or dtype, or with other channels than `cin`."""
    if jnp.ndim(x) != 3 or (cin is not None and x.shape[2] != cin):
        channels = "cin" if cin is None else cin
        raise ValueError(f"{function}: x must be [batch, length, {channels}], got {jnp.shape(x)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{function}: x must be floating point, got {x.dtype}")


def check_filter(function: str, w: Array) -> None:
    """Refuse a filter of wrong rank or dtype, or without taps."""
    if jnp.ndim(w) != 3 or w.shape[0] < 1:
        raise ValueError(f"{function}: w must be [taps, cin, cout], got {jnp.shape(w)}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"{function}: w must be floating point, got {w.dtype}")


def check_signal_and_filter(function: str, x: Array, w: Array) -> None:
    """Refuse signals and filters that do not fit each other."""
    check_signal(function, x)
    check_filter(function, w)
    if x.shape[2] != w.shape[1]:
        raise ValueError(
            f"{function}: w must be [taps, {x.shape[2]}, cout] for x with {x.shape[2]} channels, "
            f"got {w.shape}"
        )


def check_length(function: str, x: Array, pads: tuple[Any, Any], extent: int) -> None:
    """Refuse a signal shorter, with its padding, than the filter reaches; symbolic ones pass."""
    frames = x.shape[1] + pads[0] + pads[1]
    if isinstance(frames, int) and frames < extent:
        raise ValueError(
            f"{function}: the filter reaches over {extent} frames, and x with its padding has "
            f"{frames}"
        )


def check_geometry(function: str, stride: int, dilation: int) -> None:
    """Refuse a stride or dilation below 1."""
    for argument, value in (("stride", stride), ("dilation", dilation)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{function}: {argument} must be an integer of at least 1, got {value}"
            )


def check_domain(function: str, domain: str, choices: tuple[str, ...]) -> None:
    """Refuse another domain."""
    if domain not in choices:
        raise ValueError(f"{function}: domain must be one of {choices}, got {domain!r}")


def check_algorithm(function: str, algorithm: str, taps: int, dilation: int) -> None:
    """Refuse an unknown name, and one that does not serve the filter; say which do."""
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"{function}: unknown algorithm {algorithm!r}; there are {', '.join(ALGORITHMS)}"
        )
    if dilation != 1 and algorithm != "direct":
        raise ValueError(
            f"{function}: a dilated filter is served by algorithm='direct' alone, got {algorithm!r}"
        )
    ALGORITHMS[algorithm].tap_blocks(taps)
