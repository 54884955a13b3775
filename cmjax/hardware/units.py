"""Quantities as people write them: `"1.6 TB/s"`, `"376 TFLOPS"`, `"0.2 us"`, `"84 %"` -> SI."""

import math
import re

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}

UNITS: dict[str, dict[str, float]] = {
    "bytes": {f"{p}B": s for p, s in (_DECIMAL | _BINARY).items()},
    "bytes/s": {f"{p}B/s": s for p, s in (_DECIMAL | _BINARY).items()}
    | {f"{p}bps": s / 8 for p, s in _DECIMAL.items()},
    "flop/s": {f"{p}{u}": s for p, s in _DECIMAL.items() for u in ("FLOPS", "OPS")},
    "s": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9},
    "fraction": {"%": 1e-2},
}

_QUANTITY = re.compile(
    r"\s*(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(?P<unit>\S*)\s*"
)


def parse_quantity(text: object, dimension: str) -> float:
    """Read one quantity.

    Args:
      text: a string such as `"1.6 TB/s"`.
      dimension: a key of `UNITS`: `bytes`, `bytes/s`, `flop/s`, `s` or `fraction`.
    Returns: the value in SI units (bytes, seconds, FLOP), positive or zero.
    Raises:
      ValueError: no unit, a unit of another dimension, not a number, negative or not finite.
    """
    units = UNITS[dimension]
    example = {
        "bytes": "64 GB",
        "bytes/s": "1.6 TB/s",
        "flop/s": "376 TFLOPS",
        "s": "1.2 us",
        "fraction": "84 %",
    }[dimension]
    if not isinstance(text, str):
        raise ValueError(f'{text!r} has no unit; expected a string like "{example}"')
    found = _QUANTITY.fullmatch(text)
    if found is None:
        raise ValueError(f'{text!r} is not a number with a unit; expected one like "{example}"')
    if found["unit"] not in units:
        unit = f"unit {found['unit']!r}" if found["unit"] else "no unit"
        raise ValueError(f'{text!r} has {unit}; expected {dimension}, like "{example}"')
    value = float(found["number"]) * units[found["unit"]]
    if value < 0:
        raise ValueError(f"{text!r} is negative")
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not finite")
    return value
