"""Readers of recorded expert loads and token-level routes, in all the shapes recorders write."""

from cmjax.placement.files.readers.read import (
    domains,
    read_family,
    read_loads,
    read_pairs,
    read_routes,
)

__all__ = ["domains", "read_family", "read_loads", "read_pairs", "read_routes"]
