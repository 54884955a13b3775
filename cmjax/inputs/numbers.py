"""Numbers from options and files: of the right kind, finite, and no larger than anything can be.

Every check is one `ValueError` that names what was given and what would do.
"""

import math
import reprlib
from typing import Any

import numpy as np

MOST_SIZE = 10**9
"""Tokens, rows, requests: more than any machine holds, and products of four stay finite."""
MOST_SEED = 2**32 - 1
_REPR = reprlib.Repr(
    maxlevel=3, maxlist=4, maxdict=4, maxtuple=4, maxstring=60, maxlong=60, maxother=60
)  # as a list of a few lists may be larger than memory when it is written out


def check_count(name: str, value: Any, *, least: int = 1, most: int = MOST_SIZE) -> None:
    """Raise ValueError unless `value` is a whole number from `least` to `most`.

    >>> check_count("ranks", 0)
    Traceback (most recent call last):
    ValueError: ranks must be at least 1, got 0
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {shown(value)}")
    _check_between(name, value, least, most)


def check_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
) -> None:
    """Raise ValueError unless `value` is a finite number, at least `least`, more than `above` and
    at most `most`.

    >>> check_number("rate", float("nan"), above=0)
    Traceback (most recent call last):
    ValueError: rate must be a finite number, got nan
    """
    if not isinstance(value, int | float | np.number) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {shown(value)}")
    if isinstance(value, float | np.floating) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    if not value > above:
        bound = "positive" if above == 0 else f"more than {above:g}"
        raise ValueError(f"{name} must be {bound}, got {shown(value)}")
    _check_between(name, value, least, most)


def check_seed(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a seed: 0 to `MOST_SEED`."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_SEED:
        return
    raise ValueError(f"{name} must be 0 to {MOST_SEED}, got {shown(value)}")


def whole_numbers(
    array: np.ndarray, name: str, source: str, *, ndim: int, least: int = 0, most: int = MOST_SIZE
) -> np.ndarray:
    """An array of a file as int64, if it holds whole numbers from `least` to `most`.

    Raises: ValueError, one line that starts with `source`: other kind, dimensions, sign or size.
    """
    if array.dtype.kind not in "iu" or array.ndim != ndim:
        raise ValueError(
            f"{source}: expected {name} as whole numbers in {ndim} dimension{'s' * (ndim > 1)}, "
            f"found {array.dtype} of shape {array.shape}"
        )
    if array.size:
        low, high = int(array.min()), int(array.max())
        if low < least or high > most:
            raise ValueError(
                f"{source}: expected {name} from {least} to {most}, found "
                f"{low if low < least else high}"
            )
    return array.astype(np.int64)


def shown(value: Any, most: int = 60) -> str:
    """A value as messages show it: bounded, whatever it is."""
    try:
        text = f"{value:g}" if isinstance(value, float) else _REPR.repr(value)
    except ValueError:  # Python writes no whole number of more than some thousand digits
        return f"a number of {int(int(value).bit_length() * math.log10(2)) + 1} digits"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _check_between(name: str, value: Any, least: float, most: float) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least:g}, got {shown(value)}")
    if value > most:
        large = f"{most:,}" if isinstance(most, int) else f"{most:g}"
        raise ValueError(f"{name} must be at most {large}, got {shown(value)}")
