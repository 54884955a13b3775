"""What the options of `cmjax place` say of a problem: windows, families of workloads, memory."""

import dataclasses
import re

import jax
import numpy as np

from cmjax import placement
from cmjax.deploy.step import MoEStep


def parse_windows(text: str, windows: int, option: str) -> tuple[int, int]:
    """The windows that `A:B` names of `windows`: from A to before B, either left out.

    Raises: ValueError of one line that starts with `option`, also if none is left.
    """
    found = re.fullmatch(r"(\d*):(\d*)", text)
    first, last = (int(found[1] or 0), int(found[2] or windows)) if found else (0, 0)
    if not 0 <= first < last <= windows:
        raise ValueError(f"{option} {text}: expected A:B with 0 <= A < B <= {windows} windows")
    return first, last


def parse_ranks(text: str, option: str) -> tuple[int, ...]:
    """Ranks such as `3,17`, sorted, each once.

    Raises: ValueError of one line that starts with `option`.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{option}: expected ranks such as 3,17, got {text!r}")
    return tuple(sorted({int(part) for part in parts}))


def parse_bytes(text: str, option: str) -> float:
    """Bytes such as `2GB` (10**9), `512MiB` (2**20), `1.5e9`.

    Raises: ValueError of one line that starts with `option`.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:e\d+)?|\.\d+)\s*(?:([kmgt])(i?))?b?\s*", text.lower())
    if found is None:
        raise ValueError(f"{option}: expected bytes such as 2GB or 512MiB, got {text!r}")
    number, prefix, binary = found.groups()
    return float(number) * (1024.0 if binary else 1000.0) ** (" kmgt".index(prefix or " "))


def same_model(loads: placement.Loads, other: placement.Loads) -> None:
    """Raise ValueError unless both count the same layers and experts."""
    if other.counts.shape[1:] != loads.counts.shape[1:]:
        raise ValueError(
            f"{other.source}: {other.layers} layers of {other.experts} experts; {loads.source} has "
            f"{loads.layers} of {loads.experts}"
        )
    labels = (other.layer_labels, loads.layer_labels)
    if None not in labels and labels[0] != labels[1]:
        raise ValueError(f"{other.source}: numbers its layers otherwise than {loads.source}")


def join_loads(loads: placement.Loads, other: placement.Loads) -> placement.Loads:
    """Windows of both, each scaled to the tokens of the first: workloads count alike.

    Raises: ValueError if layers or experts differ.
    """
    same_model(loads, other)
    total = float(loads.counts[0].sum(-1).mean())
    counts = [part.scaled(total).counts for part in (loads, other)]
    return dataclasses.replace(loads, counts=np.concatenate(counts))


def weight_bytes(layer: MoEStep) -> float:
    """Weights that a rank holds of a layer."""
    leaves = jax.tree.leaves(layer.args[0])
    return sum(float(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves) / layer.ranks
