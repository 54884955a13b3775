"""What counts, of the time in many windows or workloads: their mean, their tail, the worst.

    mean          the average window
    quantile:q    the time that a share q of the windows does not exceed
    cvar:q        the mean over the worst share 1 - q of the windows: conditional value at risk
                  (Rockafellar and Uryasev, "Optimization of conditional value-at-risk", 2000)
    worst         the slowest window

Time is summed over layers before this: a window is slow as a whole, and a layer in which it is fast
makes up for one in which it is not.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_KINDS = ("mean", "quantile", "cvar", "worst")


@dataclass(frozen=True)
class Risk:
    """A measure over windows; `risk(values)` reduces the first axis.

    Attributes:
      kind: mean, quantile, cvar or worst.
      level: q of quantile and cvar, in [0, 1).
    Raises: ValueError for another kind or level.
    """

    kind: str = "mean"
    level: float = 0.0

    def __post_init__(self):
        if self.kind not in _KINDS:
            raise ValueError(f"Risk: expected {', '.join(_KINDS)}, got {self.kind!r}")
        if not 0 <= self.level < 1:
            raise ValueError(f"Risk: level must lie in [0, 1), got {self.level}")

    @classmethod
    def parse(cls, text: str) -> "Risk":
        """`mean`, `worst`, `quantile:0.9`, `cvar:0.9`.

        Raises: ValueError for anything else.
        """
        kind, colon, level = text.partition(":")
        try:
            if bool(colon) != (kind in ("quantile", "cvar")):
                raise ValueError
            return cls(kind, float(level) if colon else 0.0)
        except ValueError:
            raise ValueError(
                f"objective {text!r}: expected mean, worst, quantile:Q or cvar:Q with Q in [0, 1), "
                f"as in cvar:0.9"
            ) from None

    def __str__(self) -> str:
        return f"{self.kind}:{self.level:g}" if self.kind in ("quantile", "cvar") else self.kind

    def tail(self, windows: int) -> int:
        """How many of the slowest windows, counted from the top, the measure looks at."""
        if self.kind == "mean":
            return windows
        if self.kind == "worst":
            return 1
        if self.kind == "quantile":
            return windows - math.ceil(self.level * windows - 1e-9) + (self.level > 0)
        return math.ceil(round((1 - self.level) * windows, 9))

    def weights(self, windows: int) -> Float[np.ndarray, "windows"]:
        """Weight of the slowest window, of the second slowest, and so on; they sum to 1."""
        place = np.arange(windows)
        if self.kind == "mean":
            return np.full(windows, 1 / windows)
        if self.kind in ("worst", "quantile"):
            return (place == min(self.tail(windows), windows) - 1).astype(float)
        share = max((1 - self.level) * windows, 1.0)
        return np.clip(share - place, 0, 1) / share  # the last window of the tail counts in part

    def __call__(self, values: Float[np.ndarray, "windows *rest"]) -> Float[np.ndarray, "*rest"]:
        """The measure over the first axis."""
        slowest_first = -np.sort(-np.asarray(values, np.float64), axis=0)
        return np.tensordot(self.weights(len(slowest_first)), slowest_first, 1)

    def slope(
        self, values: Float[Array, "windows"], sharpness: float | Array
    ) -> Float[Array, "windows"]:
        """Weight of each window in the measure, smoothed over windows within about 1 / sharpness.

        The order is softened as in Prillo and Eisenschlos, "SoftSort", ICML 2020. With infinite
        sharpness `slope(values) @ values` is the measure, and the slope its derivative.
        """
        if self.kind == "mean":
            return jnp.full(len(values), 1 / len(values))
        ordered = -jnp.sort(-values)
        nearness = jax.nn.softmax(-sharpness * jnp.abs(ordered[:, None] - values), axis=-1)
        return jnp.asarray(self.weights(len(values)), nearness.dtype) @ nearness

    def slope_at(self, times: Float[np.ndarray, "windows"]) -> Float[np.ndarray, "windows"]:
        """`slope` at times of any unit, smoothed over those within 1 % of the mean."""
        return np.asarray(self.slope(jnp.asarray(times / times.mean()), 100.0), np.float64)


MEAN = Risk()
