"""A training's options: numbers that no training can come of are refused; a record in JSON."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmjax.inputs import check_seed

_RATES = ("learning_rate", "scale_rate", "bias_rate", "weight_decay")
_COUNTS = ("steps", "scale_steps")


def check_numbers(options: Any) -> None:
    """Refuse numbers that are not finite, rates and counts below 0, and seeds that are none.

    Args: options: a dataclass; those in it are looked through too.
    Raises: ValueError: names the option.
    """
    for path, value in _fields(options):
        option, name = "--" + ".".join(path).replace("_", "-"), path[-1]
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{option} must be finite, got {number}")
            if name in (*_RATES, *_COUNTS) and isinstance(number, int | float) and number < 0:
                raise ValueError(f"{option} must not be negative, got {number}")
        if name == "seed":
            check_seed(option, value)


def plain(value: Any) -> Any:
    """Dictionaries, lists and numbers of JSON, of those that have tuples and paths in them.

    >>> plain({"text": (Path("a"), Path("b")), "steps": 3})
    {'text': ['a', 'b'], 'steps': 3}
    """
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _fields(options: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        inside = value if isinstance(value, tuple) else (value,)
        for one in inside:
            if dataclasses.is_dataclass(one):
                yield from _fields(one, (*above, field.name))
        if not any(map(dataclasses.is_dataclass, inside)):
            yield (*above, field.name), value
