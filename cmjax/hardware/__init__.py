"""What a machine is: pytrees of physical constants, and a catalog with a source per number."""

from cmjax.hardware.load import as_machine, catalog, load_machine, replace_leaf, sources
from cmjax.hardware.machine import (
    TIERS,
    Chip,
    Efficiency,
    Exchange,
    Fabric,
    Supernode,
    Tier,
)

__all__ = [
    "TIERS",
    "Chip",
    "Efficiency",
    "Exchange",
    "Fabric",
    "Supernode",
    "Tier",
    "as_machine",
    "catalog",
    "load_machine",
    "replace_leaf",
    "sources",
]
