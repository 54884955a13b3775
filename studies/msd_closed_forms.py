"""Closed forms: a quantized product with its weights dequantized first, or by multi-scale parts.

    dequantize   vector: N K c_dq                      cube: 2 M N K at the 16-bit rate
    parts        vector: M K c_dec + M N c_cmb         cube: 2 p M N K at the 8-bit rate

for `[M, K] x [K, N]` with p parts. They follow the argument of Zheng et al., arXiv 2605.13915: on a
chip whose vector cores dequantize for its cube cores, the vector work N K c_dq can be the longer
one, and the parts' does not grow with the weights. The paper's printed formulas and constants were
not at hand; these are derived, and agree with its "up to 2.5 times" less KV traffic (5 bytes per
value to 2). `msd_dot`'s cost rule counts the same, and the tests compare the two.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from cmjax.hardware import Chip
from cmjax.hardware.machine import Scalar
from cmjax.primitives.msd.decompose import decompose_instructions
from cmjax.primitives.msd.product import recombine_instructions

DEQUANTIZE_INSTRUCTIONS = 2.0
"""Vector instructions per weight: a cast and a product with its scale, in bfloat16."""

Path = Literal["dequantize", "parts", "stacked"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductCost:
    """Work of one product, in numbers: vector bytes (elements x bytes x instructions), cube FLOP by
    rate, and bytes through HBM."""

    vector_bytes: Scalar
    cube_flops_8bit: Scalar
    cube_flops_16bit: Scalar
    hbm_bytes: Scalar

    def seconds(self, chip: Chip, *, overlapped: bool = True) -> Scalar:
        """Time at the chip's peaks: the longest of cube, vector and HBM; or, if the cube waits for
        the vector cores (`overlapped=False`), cube plus vector, or HBM if that is longer."""
        cube = self.cube_flops_8bit / chip.cube_flops_8bit
        cube = cube + self.cube_flops_16bit / chip.cube_flops_16bit
        vector = self.vector_bytes / chip.vector_bytes_per_s
        hbm = self.hbm_bytes / chip.hbm_bytes_per_s
        compute = jnp.maximum(cube, vector) if overlapped else cube + vector
        return jnp.maximum(compute, hbm)


def dequantized_product(
    rows: Scalar, features: Scalar, inner: Scalar, *, through_memory: bool = False
) -> ProductCost:
    """16-bit product with int8 weights dequantized by the vector cores.

    Args:
      rows, features, inner: M, N and K.
      through_memory: the 16-bit weights are written to HBM and read again, 5 bytes per weight,
        instead of handed over on chip, 1 byte.
    """
    weights = features * inner
    return ProductCost(
        vector_bytes=weights * (2.0 * DEQUANTIZE_INSTRUCTIONS),
        cube_flops_8bit=0.0,
        cube_flops_16bit=2.0 * rows * weights,
        hbm_bytes=weights * (5.0 if through_memory else 1.0) + 2.0 * rows * (inner + features),
    )


def parts_product(
    rows: Scalar,
    features: Scalar,
    inner: Scalar,
    *,
    passes: int = 2,
    stacked: bool = True,
    fused: bool = True,
) -> ProductCost:
    """Multi-scale product with int8 weights, 16-bit activations and results.

    Args:
      rows, features, inner: M, N and K.
      passes: parts p of the activations.
      stacked: all parts meet the weights in one product, which reads them once; else p times.
      fused: parts and int32 sums stay on chip; else both are written and read.
    """
    weights = features * inner
    unfused = 2.0 * passes * rows * inner + 8.0 * passes * rows * features
    split, joined = decompose_instructions(passes), recombine_instructions(passes)
    return ProductCost(
        vector_bytes=4.0 * rows * (inner * split + features * joined),
        cube_flops_8bit=2.0 * passes * rows * weights,
        cube_flops_16bit=0.0,
        hbm_bytes=weights * (1.0 if stacked else passes)
        + 2.0 * rows * (inner + features)
        + (0.0 if fused else unfused),
    )


def kv_bytes(keys: Scalar, head_dim: Scalar, path: Path) -> Scalar:
    """HBM bytes of one int8 tensor of keys or values in attention.

    "dequantize" reads int8, writes and reads bfloat16: 5 per value; "parts" reads int8 once for
    each of two parts: 2; "stacked" reads it once for all parts: 1.
    """
    per_value = {"dequantize": 5.0, "parts": 2.0, "stacked": 1.0}
    if path not in per_value:
        raise ValueError(f"kv_bytes: path must be one of {', '.join(per_value)}, got {path!r}")
    return keys * head_dim * per_value[path]


def crossover_rows(
    features: Scalar,
    inner: Scalar,
    *,
    dequantize: Scalar = 1.0,
    decompose: Scalar = 1.0,
    recombine: Scalar = 1.0,
    passes: int = 2,
) -> Scalar:
    """Rows below which parts need less vector work: N K c_dq / (K c_dec + p N c_cmb).

    `dequantize` is per weight, `decompose` per activation, `recombine` per result and part. With
    unit costs, two parts and N = K = 4096 it is 4096 / 3: decoding gains, long prompts do not.
    """
    return features * inner * dequantize / (inner * decompose + passes * features * recombine)
