"""Consistent hashing: which node of the cache pool holds a block (Karger et al. 1997).

Every node stands at many places of a ring; a block lives on the node that follows its own place.
A node that comes or goes moves only the blocks next to its places.
"""

import numpy as np
from jaxtyping import Int32

_PLACES = 128  # of a node: the fullest node then holds about a fifth more than the mean


def nodes_of_blocks(blocks: int, nodes: int) -> Int32[np.ndarray, "blocks"]:
    """The node of each block, `0 <= node < nodes`.

    >>> found = nodes_of_blocks(10_000, 4)
    >>> bool(np.bincount(found).min() > 1_500)
    True
    """
    if nodes == 1:
        return np.zeros(blocks, np.int32)
    places = np.arange(nodes * _PLACES, dtype=np.uint64)
    ring = mix(places + np.uint64(1 << 63))
    order = np.argsort(ring)
    owner = (order // _PLACES).astype(np.int32)
    at = np.searchsorted(ring[order], mix(np.arange(blocks, dtype=np.uint64)))
    return owner[at % len(owner)]


def mix(x: np.ndarray) -> np.ndarray:
    """A hash of 64-bit numbers (the finalizer of splitmix64)."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
