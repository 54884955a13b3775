"""OmniPlacement's plans (omni-infer): 1 where a die holds an expert, `[dies, layers, experts]`.

Its planner saves the array as `.npy`. An `.npz` holds several plans as packed bits
(`numpy.packbits`), each named `..._dies<D>`; those are of DeepSeek-V3, 58 layers of 256 experts. A
layer may have more copies than another, so some slots are empty. The format does not say in which
slot of its die an expert lives: they come in the order of their numbers.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int

from cmjax.inputs import read_array, read_arrays
from cmjax.placement.plan import EMPTY, Plan

_LAYERS, _EXPERTS = 58, 256  # of DeepSeek-V3, whose plans are published packed


def from_omniplacement(file: Path, *, nodes: int = 1) -> Mapping[str, Plan]:
    """All plans of a file by name; the one of a `.npy` is named "".

    Raises: ValueError of one line for a damaged file or an array that is no placement.
    """
    if file.suffix.lower() == ".npy":
        return {"": _stored(read_array(file), nodes, str(file))}
    plans = {}
    for name, packed in read_arrays(file).items():
        dies = re.search(r"dies(\d+)", name)
        size = int(dies[1]) * _LAYERS * _EXPERTS if dies else 0
        if packed.dtype != np.uint8 or packed.ndim != 1 or len(packed) != -(-size // 8) or not size:
            raise ValueError(
                f"{file}: expected packed bits of [dies, {_LAYERS}, {_EXPERTS}] under names such "
                f"as 6k_decode_red58_dies64, found {packed.dtype} {packed.shape} as {name!r}"
            )
        held = np.unpackbits(packed, count=size).reshape(-1, _LAYERS, _EXPERTS)
        plans[name] = _stored(held, nodes, f"{file}:{name}")
    if not plans:
        raise ValueError(f"{file}: expected plans, found an empty archive")
    return plans


def _stored(held: Int[np.ndarray, "dies layers experts"], nodes: int, source: str) -> Plan:
    if held.ndim != 3 or held.dtype.kind not in "biu" or not np.isin(held, (0, 1)).all():
        raise ValueError(
            f"{source}: expected 0 and 1 as [dies, layers, experts], found {held.dtype} of shape "
            f"{held.shape}"
        )
    held = held.astype(bool).swapaxes(0, 1)  # [layers, dies, experts]
    layers, dies, experts = held.shape
    deepest = int(held.sum(-1).max(initial=0))
    order = np.argsort(~held, axis=-1, kind="stable")[..., :deepest]
    slots = np.where(np.take_along_axis(held, order, axis=-1), order, EMPTY)
    return Plan(slots.reshape(layers, -1), experts, dies, nodes, source=source)
