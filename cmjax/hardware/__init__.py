"""What a machine is: pytrees of physical constants, and a catalog with a source per number."""

from cmjax.hardware.load import (
    as_machine,
    catalog,
    describe_key,
    leaf_names,
    load_machine,
    relative_slopes,
    replace_leaf,
    sources,
)
from cmjax.hardware.machine import (
    TIERS,
    Chip,
    Efficiency,
    Engine,
    Exchange,
    Fabric,
    Factors,
    Supernode,
    Tier,
)
from cmjax.hardware.uncertainty import FITTED, Uncertainty, prior, uncertainty

__all__ = [
    "FITTED",
    "TIERS",
    "Chip",
    "Efficiency",
    "Engine",
    "Exchange",
    "Fabric",
    "Factors",
    "Supernode",
    "Tier",
    "Uncertainty",
    "as_machine",
    "catalog",
    "describe_key",
    "leaf_names",
    "load_machine",
    "prior",
    "relative_slopes",
    "replace_leaf",
    "sources",
    "uncertainty",
]
