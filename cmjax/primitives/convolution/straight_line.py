"""A small matrix as a list of additions: what a transform costs, and in which order it is summed.

    new = ca * v[a] + cb * v[b]            values v are numbered: inputs first, then steps in order

A matrix is compiled once, by greedy elimination of common two-term sums (Hartley 1996): the pair of
terms that most rows share, up to a factor, becomes a step. For the transforms of a Toom-Cook
algorithm this finds the even and odd parts that the rows of the points +p and -p share. The list is
interpreted here on any values and printed as C++ for the kernels, so both add in the same order.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

Matrix = tuple[tuple[Fraction, ...], ...]
Multiply = Callable[[Fraction, Any], Any]
"""The product of a coefficient, not 1, and a value."""


@dataclasses.dataclass(frozen=True)
class Addition:
    """One new value: `ca * v[a] + cb * v[b]`, or `ca * v[a]` where `b` is -1.

    Products are rounded before the sum; a factor of 1 or -1 is no product. If one factor is
    positive, `ca` is.
    """

    a: int
    ca: Fraction
    b: int
    cb: Fraction


@dataclasses.dataclass(frozen=True)
class StraightLine:
    """A matrix-vector product as straight-line code.

    Fields:
      inputs: values given.
      steps: what is computed, in order; step `i` makes value number `inputs + i`.
      outputs: the value numbers of the results.
    """

    inputs: int
    steps: tuple[Addition, ...]
    outputs: tuple[int, ...]

    @property
    def additions(self) -> int:
        """How many additions or subtractions the program takes."""
        return sum(step.b >= 0 for step in self.steps)

    @property
    def products(self) -> int:
        """How many multiplications by a constant other than 1 and -1 it takes."""
        return sum(abs(c) not in (0, 1) for step in self.steps for c in (step.ca, step.cb))

    def apply(
        self,
        values: Sequence[Any],
        multiply: Multiply | None = None,
    ) -> list[Any]:
        """Run the program on numbers or arrays that know +, - and unary -.

        Args:
          values: the inputs.
          multiply: the product of a coefficient and a value; in float32 by default.
        Returns: the outputs, in the order of the matrix's rows.
        Raises: ValueError if the number of values is not `inputs`.
        """
        if len(values) != self.inputs:
            raise ValueError(f"StraightLine.apply: {self.inputs} values needed, got {len(values)}")
        known = list(values)
        for step in self.steps:
            known.append(_run(step, known, multiply or multiply_float32))
        return [known[i] for i in self.outputs]


def multiply_float32(coefficient: Fraction, value: Any) -> Any:
    """The plain product in float32."""
    return as_float32(coefficient) * value


def as_float32(coefficient: Fraction) -> np.float32:
    """The float32 that stands for an exact coefficient, in XLA and in C++ alike."""
    return np.float32(coefficient.numerator / coefficient.denominator)


def straight_line(matrix: Sequence[Sequence[Fraction]]) -> StraightLine:
    """Compile a matrix without zero rows; the result depends on nothing but the matrix.

    Steps have primitive integer factors where the matrix is one of integers, so sums of integers
    stay integers, never larger than in the rows themselves.
    """
    inputs = len(matrix[0])
    rows = [{j: Fraction(c) for j, c in enumerate(row) if c} for row in matrix]
    if not all(rows):
        raise ValueError("straight_line: a row of the matrix is zero")
    steps: list[Addition] = []

    def append(step: Addition) -> int:
        steps.append(step)
        return inputs + len(steps) - 1

    while (shared := _most_shared(rows)) is not None:
        a, b, ratio = shared
        ca, cb = Fraction(ratio.denominator), Fraction(ratio.numerator)
        new = append(Addition(a, ca, b, cb))
        for row in rows:
            if a in row and b in row and row[b] / row[a] == ratio:
                row[new] = row.pop(a) / ca
                del row[b]
    outputs = tuple(_sum_of_terms(row, append) for row in rows)
    return StraightLine(inputs, tuple(steps), outputs)


def _most_shared(rows: list[dict[int, Fraction]]) -> tuple[int, int, Fraction] | None:
    """The pair of terms (a, b, factor of b over that of a) found in most rows, at least in two."""
    counts = Counter(
        (a, b, row[b] / row[a]) for row in rows for a, b in itertools.combinations(sorted(row), 2)
    )
    if not counts or max(counts.values()) < 2:
        return None
    # Among equals take sums and differences first, then the values known longest.
    return min(counts, key=lambda pair: (-counts[pair], abs(pair[2]) != 1, pair[:2], pair[2]))


def _sum_of_terms(row: dict[int, Fraction], append: Callable[[Addition], int]) -> int:
    """Add the terms of a row one after the other, a positive one first; its value number."""
    order = sorted(row, key=lambda i: (row[i] < 0, i))
    total, c = order[0], row[order[0]]
    if len(order) == 1:
        return total if c == 1 else append(Addition(total, c, -1, Fraction(0)))
    for i in order[1:]:
        total, c = append(Addition(total, c, i, row[i])), Fraction(1)
    return total


def _run(step: Addition, known: list[Any], multiply: Multiply) -> Any:
    def term(coefficient: Fraction, i: int) -> Any:
        size = abs(coefficient)
        return known[i] if size == 1 else multiply(size, known[i])

    first = term(step.ca, step.a)
    if step.b < 0:
        return -first if step.ca < 0 else first
    second = term(step.cb, step.b)
    if step.ca < 0:
        return second - first if step.cb > 0 else -(first + second)
    return first + second if step.cb > 0 else first - second


def largest_sum(matrix: Sequence[Sequence[Fraction]]) -> int:
    """Largest row sum of absolute values: how far |x| <= 1 can grow; rounded up."""
    return math.ceil(max(sum(abs(c) for c in row) for row in matrix))
