"""The registry of cost rules: one per JAX primitive, looked up by the primitive's name.

A rule is a function of the operation's arguments (as `Operand`s, by position) and of `out`, `mesh`
(axis name -> size) and the primitive's parameters (by keyword), and returns `Work`. Element-wise
primitives need only an entry in a table. A primitive without a rule cannot be priced: an error,
never a silent zero.
"""

from collections.abc import Callable

from cmjax.program.work import Work

Rule = Callable[..., Work]
RULES: dict[str, Rule] = {}


class UnpricedPrimitive(ValueError):
    """A program contains a primitive for which no cost rule is registered."""


def cost_rule(*primitives) -> Callable[[Rule], Rule]:
    """Register the decorated function as the cost rule of `primitives` (Primitives or names).

    >>> @cost_rule("my_primitive")
    ... def _cost(x, scale, *, bits, **_):
    ...     return Work(vector_bytes=x.nbytes * 4)
    >>> RULES.pop("my_primitive") is _cost
    True
    """

    def register(rule: Rule) -> Rule:
        for primitive in primitives:
            RULES[getattr(primitive, "name", primitive)] = rule
        return rule

    return register
