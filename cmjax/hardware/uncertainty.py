"""How sure the numbers of a machine are: standard deviations of the logarithm of every constant.

An entry of a machine's file may say `spread = "30 %"`; what a `spread` says of a fitted constant is
its prior, beside `prior = "..."`. Without one it follows from the first word of the source. Fitted
constants also share a covariance, which `cmjax fit` writes as the table `[fit]`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from cmjax.hardware.load import (
    as_machine,
    describe_key,
    leaf_names,
    read_tree,
    replace_leaf,
    sources,
)
from cmjax.hardware.machine import Supernode
from cmjax.hardware.units import parse_quantity

FITTED = "fitted by cmjax fit"
SPREADS = {"assumed": 0.5, "recalled": 0.2, "derived": 0.15, "chosen": 0.0}
"""Standard deviations by the first word of a source."""
PUBLISHED = 0.03
"""Of numbers that somebody published."""
EXACT = ("chip.hbm_bytes", "chip.l2_bytes")
"""Sizes, which are counted and not measured."""
_FACTORS = {"vector": 0.2, "collective": 0.2, "waiting": 0.3}
"""Of kinds of operation of which no measurement says how well they are modelled; of others 0.1."""


@dataclasses.dataclass(frozen=True)
class Uncertainty:
    """What is known of a machine's constants: independent or joint normal in their logarithms.

    Fields:
      keys: dotted keys of the machine's leaves that are not 0, which stay 0.
      covariance: of the logarithms of their values.
      joint: keys that a fit has seen, which share a covariance.
    """

    keys: tuple[str, ...]
    covariance: Float[np.ndarray, "keys keys"]
    joint: tuple[str, ...] = ()

    @property
    def spread(self) -> Float[np.ndarray, "keys"]:
        """Standard deviations."""
        return np.sqrt(np.diag(self.covariance))


def uncertainty(name_or_path: str | Path) -> Uncertainty:
    """How sure the constants of a machine are, the fitted ones as their fit left them.

    Raises: ValueError: as `load_machine`, or a `spread` or `[fit]` table that cannot be read.
    """
    return _uncertainty(name_or_path, fitted=True)


def prior(name_or_path: str | Path) -> tuple[Supernode, Uncertainty]:
    """A machine before its fit: constants at their `prior`, and how sure those are."""
    machine, tree = as_machine(name_or_path), read_tree(name_or_path)
    for key, entry in _entries(tree[0]):
        if "prior" in entry:
            value = _read(entry["prior"], describe_key(key), f"{tree[1]}: {key}: prior")
            machine = replace_leaf(machine, key, value)
    return machine, _uncertainty(name_or_path, fitted=False)


def _uncertainty(name_or_path: str | Path, *, fitted: bool) -> Uncertainty:
    machine, (tree, origin) = as_machine(name_or_path), read_tree(name_or_path)
    entries, said = dict(_entries(tree)), sources(name_or_path)
    values = dict(zip(leaf_names(machine), _leaves(machine), strict=True))
    keys = tuple(key for key, value in values.items() if value != 0)
    spread = [_spread(key, entries.get(key, {}), said.get(key, ""), origin) for key in keys]
    covariance = np.diag(np.square(spread))
    joint: tuple[str, ...] = ()
    if fitted and "fit" in tree:
        found = _fit(tree["fit"], keys, origin)
        at = [keys.index(key) for key in found.keys]
        covariance[np.ix_(at, at)] = found.covariance
        joint = found.keys
    return Uncertainty(keys, covariance, joint)


def _fit(table: Any, keys: tuple[str, ...], origin: str) -> Uncertainty:
    try:
        names = tuple(table["constants"])
        rows = np.array(table["covariance"], float)
    except (TypeError, KeyError, ValueError):
        raise ValueError(
            f"{origin}: table [fit] needs constants, a list of keys, and covariance, a row for each"
        ) from None
    unknown = [name for name in names if name not in keys]
    if unknown or rows.shape != (len(names), len(names)):
        raise ValueError(
            f"{origin}: table [fit]: "
            + (f"no constant {unknown[0]!r}" if unknown else f"covariance has shape {rows.shape}")
        )
    return Uncertainty(names, (rows + rows.T) / 2)


def _spread(key: str, entry: dict, source: str, origin: str) -> float:
    if "spread" in entry:
        return _read(entry["spread"], "fraction", f"{origin}: {key}: spread")
    if key.startswith("factors."):
        return _FACTORS.get(key.removeprefix("factors."), 0.1)
    if key in EXACT:
        return 0.0
    return SPREADS.get(source.replace(":", " ").split(" ")[0], PUBLISHED)


def _read(text: Any, dimension: str, what: str) -> float:
    try:
        return parse_quantity(text, dimension)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _entries(tree: Any, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict) and "value" in value:
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from _entries(value, f"{prefix}{key}.")


def _leaves(machine: Supernode) -> list[float]:
    return [float(leaf) for leaf in jax.tree.leaves(machine)]
