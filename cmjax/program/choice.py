"""Choices that depend on sizes, made while a program is traced, and remembered.

What fuses with what, and which branch of a `cond` costs more, hangs on which of two sizes is the
larger. Most pairs are ordered whatever the symbols are (`8*n <= 128*n`); the others are ordered at
the sizes given, else with every symbol at `PROBE`, and kept as assumptions of the program, so that
a price at sizes that order them otherwise can say so. A size below 1 (the mean of a load) is a
relaxation of the sizes from 1 on, and chooses as 1 does.
"""

from collections.abc import Mapping

from cmjax.program.size import Size

PROBE = 1024.0
"""Value of every symbol of which nothing is known, where two sizes must be ordered."""
_ROUNDING = 1e-6


class Choices:
    """Orders sizes at one point, and collects the pairs whose order depends on the point."""

    def __init__(self, at: Mapping[str, float] | None = None):
        self.at = dict(at or {})
        self.assumed: dict[tuple[Size, Size], None] = {}
        self._known: dict[tuple[Size, Size], bool] = {}

    def at_most(self, left: Size, right: Size) -> bool:
        """Whether `left <= right`, at this point."""
        pair = left, right
        if pair not in self._known:
            self._known[pair] = self._order(left, right)
        return self._known[pair]

    def _order(self, left: Size, right: Size) -> bool:
        difference = right - left
        if _never_negative(difference):
            return True
        holds = self._value(left) <= self._value(right)
        if not holds and _never_negative(difference * -1.0):
            return False
        self.assumed[(left, right) if holds else (right, left)] = None
        return holds

    def largest(self, sizes: list[Size]) -> int:
        """Index of the largest, the first of equals."""
        best = 0
        for i in range(1, len(sizes)):
            if not self.at_most(sizes[i], sizes[best]):
                best = i
        return best

    def _value(self, size: Size) -> float:
        return float(size.evaluate({s: max(1.0, self.at.get(s, PROBE)) for s in size.symbols()}))


def broken(assumed: tuple[tuple[Size, Size], ...], sizes: Mapping[str, float]) -> list[str]:
    """The assumptions `left <= right` that do not hold at `sizes`, as text."""
    point = {name: max(1.0, value) for name, value in sizes.items()}
    found = []
    for left, right in assumed:
        if (left.symbols() | right.symbols()) <= set(point):
            low, high = float(left.evaluate(point)), float(right.evaluate(point))
            if low > high + _ROUNDING * abs(high):
                found.append(f"{left} <= {right}")
    return found


def _never_negative(size: Size) -> bool:
    """Whether no positive symbols make it negative, told from its coefficients; symbols and what
    is made of them (maxima, quotients) are positive."""
    return all(coefficient >= 0 for coefficient in size.terms.values())
