"""Cost rules of JAX's primitives, and the registry that holds everyone's."""

from cmjax.program.rules import kernels, linear_algebra, products, selection
from cmjax.program.rules.collectives import exchange
from cmjax.program.rules.elementwise import (
    ELEMENTWISE,
    FREE,
    MOVES,
    REDUCTIONS,
    TRANSCENDENTAL,
    elementwise_work,
    reduction_work,
)
from cmjax.program.rules.registry import RULES, Rule, UnpricedPrimitive, cost_rule

__all__ = [
    "ELEMENTWISE",
    "FREE",
    "MOVES",
    "REDUCTIONS",
    "RULES",
    "TRANSCENDENTAL",
    "Rule",
    "UnpricedPrimitive",
    "cost_rule",
    "elementwise_work",
    "exchange",
    "kernels",
    "linear_algebra",
    "products",
    "reduction_work",
    "selection",
]
