"""The shifting matrix of PASA, the beta that suits a number format, and the recovery gain.

    M = I - (beta / n) 1 1^T          K' = (scale M) K          S' = q K'^T = s - beta mean(s)

Chen et al. 2025, "Online Pseudo-average Shifting Attention (PASA) for Robust Low-precision LLM
Inference" (arXiv 2503.01873). The average of S' over a block is (1 - beta) times that of the true
scores s, so what the shift removed is recovered as `gain * mean(S')`, gain = beta / (1 - beta).
A half-precision M has other row sums than 1 - beta; the functions here account for them in float64.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike, Float

_START = 1 - 2.0**-4
_MOST_ITERATIONS = 64
_SETTLED = 1e-12  # half-precision entries settle exactly, float64 ones up to their own rounding


@functools.cache
def pasa_beta(block_size: int, dtype: DTypeLike = "float16", *, start: float = _START) -> float:
    """The beta near `start` for which rounding M to `dtype` leaves its row sums at `1 - beta`.

        beta <- 1 - rowsum(fl(M(beta)))        until it stands still

    is the authors' fixed-point iteration (their `optimal_para.py`) in simplest terms: the two forms
    are equal by algebra. At the fixed point gain = beta / (1 - beta) holds in low precision too.

    Args:
      block_size: keys per block, n.
      dtype: format of the matrix entries.
      start: where to begin; the authors' starts are 1 - 2^-4, 1 - 2^-5 and 1 - 2^-6.
    Raises: ValueError for a block size that is no positive integer, a dtype that is not floating
      point, a start outside [0, 1), or no fixed point.
    Example:

      >>> round(pasa_beta(128), 4)
      0.9375
    """
    if int(block_size) != block_size or block_size < 1:
        raise ValueError(f"pasa_beta: block_size must be at least 1, an integer; got {block_size}")
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(f"pasa_beta: dtype must be floating point, got {jnp.dtype(dtype)}")
    if not 0 <= start < 1:
        raise ValueError(f"pasa_beta: start must lie in [0, 1), got {start}")
    beta = start
    for _ in range(_MOST_ITERATIONS):
        diagonal, other = _entries(block_size, beta, 1.0, dtype)
        following = 1 - (diagonal + (block_size - 1) * other)
        if abs(following - beta) <= _SETTLED:
            return following
        beta = following
    raise ValueError(
        f"pasa_beta: no fixed point near {start} for blocks of {block_size} in {jnp.dtype(dtype)}"
    )


def shift_matrix(
    block_size: int, beta: float, scale: float, dtype: DTypeLike = "float16"
) -> Float[np.ndarray, "n n"]:
    """`scale (I - (beta / n) 1 1^T)`, each entry rounded once to `dtype`; float64 array."""
    diagonal, other = _entries(block_size, beta, scale, dtype)
    return np.where(np.eye(block_size, dtype=bool), diagonal, other)


def recovery_gain(
    block_size: int, beta: float, scale: float, dtype: DTypeLike = "float16"
) -> float:
    """The factor from the average of S' to what the rounded shift matrix removed.

        gain = scale / rowsum(fl(scale M)) - 1

    Equals beta / (1 - beta) without rounding. With the scale folded into M before it is rounded,
    the two differ where the scale is no power of two: 14.982 against 15 at d = 128.
    Raises: ValueError if rounding leaves no positive row sum, so that nothing recovers the mean.
    """
    diagonal, other = _entries(block_size, beta, scale, dtype)
    row_sum = diagonal + (block_size - 1) * other
    if row_sum <= 0:
        raise ValueError(
            f"pasa_attention: a shift by beta {beta} with scale {scale} in blocks of {block_size} "
            f"cannot be undone once rounded to {jnp.dtype(dtype)}: its rows sum to {row_sum:.3g}; "
            "take a smaller beta or shift='mean'"
        )
    return scale / row_sum - 1


def _entries(block_size: int, beta: float, scale: float, dtype: DTypeLike) -> tuple[float, float]:
    """Diagonal and off-diagonal entry of the rounded, scaled matrix."""
    exact = np.array([scale * (1 - beta / block_size), -scale * beta / block_size])
    diagonal, other = exact.astype(jnp.dtype(dtype)).astype(np.float64)
    return float(diagonal), float(other)
