"""Which algorithm for a convolution: the fastest whose expected accuracy stays above a floor.

    SQNR = base(domain) - 10 log10(amplification)      time = products + 3 x transform instructions

Expected accuracy is the closed form of `Algorithm.amplification` below what direct convolution of
the domain reaches on white signals; time is counted, not measured, so that a choice is the same on
every machine. A transform instruction weighs as three multiply-adds, about what AVX2 and AVX-512
kernels show, so few channels or a short signal stay direct.
"""

import math
from typing import Any

from cmjax.primitives.convolution.tiles import transform_instructions
from cmjax.primitives.convolution.toom_cook import ALGORITHMS, Algorithm, supported

BASE_SQNR_DB = {"int8": 38.0, "int16": 62.0, "float32": 140.0}
"""What direct convolution reaches on Gaussian signals with scales chosen by squared error."""

FLOOR_DB = {"int8": 29.0, "int16": 38.0, "float32": 110.0}
"""Default floors: int16 is held to what direct int8 gives."""

_INSTRUCTION_IN_MACS = 3.0


def expected_sqnr_db(algorithm: str, taps: int, domain: str) -> float:
    """Expected ratio of signal to quantization noise of an algorithm in a domain, in dB.

    Example: F(2,3) amplifies the noise of direct int8 by 5/3, which is 2.2 dB.

      >>> round(expected_sqnr_db("direct", 3, "int8") - expected_sqnr_db("F(2,3)", 3, "int8"), 1)
      2.2
    """
    noise = ALGORITHMS[algorithm].amplification(taps)
    return BASE_SQNR_DB[domain] - 10 * math.log10(noise)


def relative_time(
    algorithm: str, taps: int, cin: int, cout: int, outputs: int | None = None
) -> float:
    """Time in units of direct multiply-adds of one output frame: 1 is as fast as direct products.

    Args:
      algorithm: name.
      taps, cin, cout: of the filter, after folding a stride into channels.
      outputs: frames computed; whole tiles are paid for. Not known: many.
    """
    form = ALGORITHMS[algorithm]
    frames = form.m if outputs is None else outputs / -(-outputs // form.m)  # used of each tile
    products = form.n * form.tap_blocks(taps) * cin * cout
    return (products + _INSTRUCTION_IN_MACS * _transforms(form, cin, cout)) / (
        frames * taps * cin * cout
    )


def choose_algorithm(
    taps: int,
    cin: int,
    cout: int,
    *,
    domain: str = "float32",
    outputs: int | None = None,
    dilation: int = 1,
    min_sqnr_db: float | None = None,
) -> str:
    """The fastest algorithm by `relative_time` with `expected_sqnr_db` of at least the floor.

    Args:
      taps, cin, cout: of the filter, after folding a stride into channels.
      domain: "float32", "int8" or "int16".
      outputs: output frames, if known.
      dilation: more than 1 leaves direct convolution alone.
      min_sqnr_db: the floor; default `FLOOR_DB`.
    Raises: ValueError for another domain, sizes below 1, or a floor that direct convolution too
      stays below.
    Example: few channels stay direct, many take a short algorithm.

      >>> choose_algorithm(3, 1, 1, domain="int8"), choose_algorithm(3, 256, 256, domain="int8")
      ('direct', 'F(4,3)')
    """
    if domain not in BASE_SQNR_DB:
        raise ValueError(
            f"choose_algorithm: domain must be one of {', '.join(BASE_SQNR_DB)}, got {domain!r}"
        )
    if min(taps, cin, cout, 1 if outputs is None else outputs) < 1:
        raise ValueError(
            "choose_algorithm: taps, cin, cout and outputs must be at least 1, got "
            f"{taps}, {cin}, {cout} and {outputs}"
        )
    floor = FLOOR_DB[domain] if min_sqnr_db is None else min_sqnr_db
    if floor > BASE_SQNR_DB[domain]:
        raise ValueError(
            f"choose_algorithm: min_sqnr_db={floor:g} is more than direct convolution of {domain} "
            f"gives, about {BASE_SQNR_DB[domain]:g} dB"
        )
    names = supported(taps) if dilation == 1 else ("direct",)
    accurate = [name for name in names if expected_sqnr_db(name, taps, domain) >= floor]
    return min(accurate, key=lambda name: relative_time(name, taps, cin, cout, outputs))


def _transforms(form: Algorithm, cin: int, cout: int) -> Any:
    """Instructions of one tile: transforms, and what turns sums into operands and outputs."""
    if form.name == "direct":
        return 2.0 * cin + 2.0 * cout
    inputs = transform_instructions(form.bt_program) + 3.0 * form.n
    outputs = transform_instructions(form.at_program) + 2.0 * form.n
    return inputs * cin + outputs * cout
