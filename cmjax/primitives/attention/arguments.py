"""What `pasa_attention` and `flash_attention` are called with: checked, in the caller's words."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cmjax.primitives.attention.blockwise import PRECISIONS, STATISTICS


def operands(name: str, *arrays: Any) -> list[Array]:
    """q, k, v as arrays that fit each other."""
    for letter, x in zip("qkv", arrays, strict=True):
        if not (hasattr(x, "dtype") and hasattr(x, "shape")):
            raise TypeError(f"{name}: {letter} must be an array, got {type(x).__name__}")
    q, k, v = (jnp.asarray(x) for x in arrays)
    for letter, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim not in (3, 4) or x.ndim != q.ndim:
            raise ValueError(
                f"{name}: {letter} must be [batch, length, heads, d], or all three of q, k, v "
                f"[length, heads, d]; got q {q.shape}, k {k.shape}, v {v.shape}"
            )
    check(name, *map(jax.typeof, (q, k, v)))
    return [q, k, v]


def parameters(
    name, q, precision, statistics, block_size, scale, causal, window, softcap
) -> dict[str, Any]:
    """The static parameters of the primitive that both functions have."""
    for argument, value, known in (
        ("precision", precision, PRECISIONS),
        ("statistics", statistics, STATISTICS),
    ):
        if value not in known:
            raise ValueError(f"{name}: {argument} must be one of {', '.join(known)}, got {value!r}")
    if statistics == "storage" and precision not in ("fp16", "bf16"):
        raise ValueError(
            f"{name}: statistics='storage' is for precision 'fp16' and 'bf16', got {precision!r}"
        )
    if precision == "fp64" and not jax.config.jax_enable_x64:
        raise ValueError(f"{name}: precision 'fp64' needs JAX's jax_enable_x64")
    if isinstance(block_size, bool) or not isinstance(block_size, numbers.Integral):
        raise TypeError(f"{name}: block_size must be an integer, got {block_size!r}")
    if block_size < 1:
        raise ValueError(f"{name}: block_size must be at least 1, got {block_size}")
    scale = q.shape[-1] ** -0.5 if scale is None else number(name, "scale", scale)
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"{name}: scale must be positive and finite, got {scale}")
    if not isinstance(causal, bool | np.bool_):
        raise TypeError(f"{name}: causal must be True or False, got {causal!r}")
    if window is not None and (not isinstance(window, int) or window < 1 or not causal):
        raise ValueError(
            f"{name}: window must be an integer of at least 1 key and needs causal=True, got "
            f"window={window!r} and causal={causal}"
        )
    if softcap is not None:
        softcap = number(name, "softcap", softcap)
        if not (softcap > 0 and math.isfinite(softcap)):
            raise ValueError(f"{name}: softcap must be positive and finite, got {softcap}")
    return {
        "precision": precision,
        "statistics": statistics,
        "block_size": int(block_size),
        "scale": scale,
        "causal": bool(causal),
        "window": window,
        "softcap": softcap,
    }


def number(name: str, argument: str, value: Any) -> float:
    """A number that is known at trace time."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real | np.floating):
        raise TypeError(f"{name}: {argument} must be a number known at trace time, got {value!r}")
    return float(value)


def check(name, q, k, v, *more, has_bias=False, **_):
    """Refuse operands of the primitive that do not fit each other."""
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    for letter, x in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name}: {letter} must be floating point, got {x.dtype}")
        if 0 in x.shape[-3:]:
            raise ValueError(f"{name}: {letter} must not be empty, got {shapes}")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{name}: heads must be a multiple of kv_heads, got {q.shape[-2]} query heads and "
            f"{k.shape[-2]} key heads"
        )
    if q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1] or q.shape[:-3] != k.shape[:-3]:
        raise ValueError(
            f"{name}: q and k must agree in d, k and v in all but d, and all in batch; got {shapes}"
        )
    full = (*q.shape[:-3], q.shape[-2], q.shape[-3], k.shape[-3])
    if len(more) > has_bias and more[0].dtype != jnp.bool_:
        raise TypeError(f"{name}: mask must be boolean (true: seen), got {more[0].dtype}")
    if has_bias and not jnp.issubdtype(more[-1].dtype, jnp.floating):
        raise TypeError(f"{name}: bias must be floating point, got {more[-1].dtype}")
    names = ("mask", "bias") if len(more) > has_bias else ("bias",)
    for argument, x in zip(names, more, strict=False):
        fits = len(x.shape) == len(full) and all(
            m == 1 or m == f for m, f in zip(x.shape, full, strict=True)
        )
        if not fits:
            raise ValueError(f"{name}: {argument} must be broadcastable to {full}, got {x.shape}")
