"""Placement while serving: transfers between plans and what they cost."""

from cmjax.placement.online.migration import Transfer, match, transfers, wire_s
from cmjax.placement.online.rebalancer import MigrationCost, Proposal, Rebalancer
from cmjax.placement.online.repair import count_moves, repair

__all__ = [
    "MigrationCost",
    "Proposal",
    "Rebalancer",
    "Transfer",
    "count_moves",
    "match",
    "repair",
    "transfers",
    "wire_s",
]
