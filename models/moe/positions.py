"""Rotary positions of a model, and how its context is extended: sizes and constants."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023): every frequency is divided by `factor`."""

    factor: float
    mscale_all_dim: float | None = None
    """See `YarnConfig`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """NTK-aware scaling that starts beyond `max_position`.

    Up to there it changes nothing, which is how far such a model is run here: further on, every
    cached key would have to be rotated anew at each step.
    """

    factor: float
    mscale_all_dim: float | None = None
    """See `YarnConfig`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's: slow frequencies are divided by `factor`, fast ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    """Dimensions that turn fewer times than this over the original context are divided."""
    high_freq_factor: float
    """Dimensions that turn more often than this are kept."""
    original_max_position: int
    """Context length of pre-training."""
    mscale_all_dim: float | None = None
    """See `YarnConfig`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension (Peng et al. 2023), in DeepSeek's parametrisation."""

    factor: float
    """Context length divided by `original_max_position`."""
    original_max_position: int
    """Context length of pre-training."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this over the original context are kept."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this are interpolated by `factor`."""
    mscale: float | None = None
    """Numerator of the factor on cos and sin."""
    mscale_all_dim: float | None = None
    """Denominator of that factor; with latent attention also scales the softmax's temperature."""
    attention_factor: float | None = None
    """The factor on cos and sin itself, instead of the two before."""
    truncate: bool = True
    """Whether the ends of the ramp are rounded to whole dimensions."""


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions (Su et al. 2021)."""

    theta: float = 10000.0
    """Base of the frequencies."""
    fraction: float = 1.0
    """Part of the rotary width that is rotated, its first dimensions; the rest has no position."""
    interleave: bool = True
    """Rotary pairs are neighbouring dimensions (2i, 2i+1), not (i, i + d/2)."""
    scaling: RopeScaling | None = None
    """Context extension, if any."""
