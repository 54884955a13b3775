"""Toom-Cook algorithms from points in exact rationals: convolutions with few multiplications.

    y = A^T [(G g) * (B^T d)]         y_i = sum_j d_{i+j} g_j,   m outputs, r taps, n products

F(m, r) evaluates polynomials at n - 1 = m + r - 2 rational points and at infinity (Toom 1963, Cook
1966; Winograd 1980 for the lower bound, Lavin and Gray, arXiv:1509.09308, for networks). Rows of
B^T are made primitive integers, so a transform of integers is exact; G takes the factors.

Nesting F(m1, r1) over blocks of R taps with F(R, R) inside gives an algorithm of m1 R outputs and
r1 R taps, with a few more products than the large plain algorithm and far less noise; so does a
split of the taps between two algorithms. Both are algorithms again, with matrices of their own.
A filter longer than r is served in tap blocks (see `tap_blocks`).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction

from cmjax.primitives.convolution.straight_line import (
    Matrix,
    StraightLine,
    largest_sum,
    straight_line,
)


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A bilinear algorithm for `m` outputs of a correlation with `r` taps.

    Fields:
      name: as in `ALGORITHMS`.
      m, r: outputs and taps of one application.
      bt: B^T, input transform, integers, [n, window].
      g: G, filter transform, [n, r].
      at: A^T, output transform, [m, n].
    """

    name: str
    m: int
    r: int
    bt: Matrix
    g: Matrix
    at: Matrix

    @property
    def n(self) -> int:
        """Products per application, also called points."""
        return len(self.bt)

    @property
    def window(self) -> int:
        """Inputs read by one application, m + r - 1."""
        return len(self.bt[0])

    @property
    def growth(self) -> int:
        """Largest row sum of |B^T|: the most by which the input transform enlarges a value."""
        return largest_sum(self.bt)

    @functools.cached_property
    def bt_program(self) -> StraightLine:
        """The input transform as straight-line code."""
        return straight_line(self.bt)

    @functools.cached_property
    def g_program(self) -> StraightLine:
        """The filter transform as straight-line code."""
        return straight_line(self.g)

    @functools.cached_property
    def at_program(self) -> StraightLine:
        """The output transform as straight-line code."""
        return straight_line(self.at)

    def safe_range(self, limit: int = 127) -> int:
        """Largest |integer input| whose every transform stays within `limit`."""
        return limit // self.growth

    def tap_blocks(self, taps: int) -> int:
        """Blocks of `r` taps in which a filter of `taps` is served, the last filled up with zeros.

        Block `j` of the taps meets the transformed tile `t + j`, which exists for the tile's own
        sake if outputs advance by as much as taps do: more than one block needs r == m.

        Raises: ValueError if the filter needs several blocks and r != m.
        """
        blocks = -(-taps // self.r)
        if taps < 1 or (blocks > 1 and self.r != self.m):
            raise ValueError(
                f"{self.name} serves 1 to {self.r} taps"
                f"{' times any number of blocks' if self.r == self.m else ''}, got {taps}; "
                f"for {taps} taps there are {', '.join(supported(taps)) or 'none'}"
            )
        return blocks

    def saving(self, taps: int) -> float:
        """Multiplications of direct convolution over those of this algorithm, per output."""
        return taps * self.m / (self.n * self.tap_blocks(taps))

    def amplification(self, taps: int) -> float:
        """Power of the output's quantization noise over that of direct convolution, in theory.

            mean over i of (1 / taps) sum_p A^T[i,p]^2 |G_p|^2 |B^T_p|^2

        holds for white inputs, independent filter taps, and a scale per point for inputs and
        filters at the same relative error (each row of B^T, and each of G over all tap blocks).
        """
        self.tap_blocks(taps)
        total = Fraction(0)
        for p, (row, filter_row) in enumerate(zip(self.bt, self.g, strict=True)):
            inputs = sum(c * c for c in row)
            filters = sum(filter_row[tap % self.r] ** 2 for tap in range(taps))
            total += inputs * filters * sum(outputs[p] ** 2 for outputs in self.at)
        return float(total / (self.m * taps))


def toom_cook(name: str, m: int, r: int, points: Sequence[Fraction | int | str]) -> Algorithm:
    """F(m, r) on the given finite points and infinity.

        A^T[i,k] = p_k^i,  G[k,j] = p_k^j / prod_{l != k} (p_k - p_l),
        B^T[k] = coefficients of prod_{l != k} (x - p_l);  infinity: last unit vectors, prod_l

    with each row of B^T scaled to primitive integers and the row of G against it, signed so that
    G's first entry that is not zero is positive.

    Args:
      name: the algorithm's name.
      m, r: outputs and taps, at least 1.
      points: m + r - 2 distinct rationals ("3/2" reads as one).
    Raises: ValueError for another number of points, or equal ones.
    """
    p = [Fraction(point) for point in points]
    if m < 1 or r < 1 or len(p) != m + r - 2 or len(set(p)) != len(p):
        raise ValueError(
            f"toom_cook: F({m},{r}) needs {max(m + r - 2, 0)} distinct finite points, got "
            f"{', '.join(map(str, p)) or 'none'}"
        )
    at = [[point**i for point in p] + [Fraction(int(i == m - 1))] for i in range(m)]
    bt, g = [], []
    for k, point in enumerate(p):
        others = p[:k] + p[k + 1 :]
        norm = math.prod((point - other for other in others), start=Fraction(1))
        bt.append([*_polynomial(others), Fraction(0)])
        g.append([point**j / norm for j in range(r)])
    bt.append(_polynomial(p))
    g.append([Fraction(int(j == r - 1)) for j in range(r)])
    return _normalised(name, m, r, bt, g, at)


def nested(name: str, outer: Algorithm, inner: Algorithm) -> Algorithm:
    """`outer` over blocks of R taps, each block's convolution by `inner` = F(R, R).

    Raises: ValueError if `inner` has not as many outputs as taps.
    """
    step = inner.r
    if inner.m != step:
        raise ValueError(f"nested: the inner algorithm must be F(R, R), got {inner.name}")
    window = (outer.window - 1) * step + inner.window
    bt = []
    for outer_row in outer.bt:
        for inner_row in inner.bt:
            row = [Fraction(0)] * window
            for i, a in enumerate(outer_row):
                for j, b in enumerate(inner_row):
                    row[i * step + j] += a * b
            bt.append(row)
    g, at = _kronecker(outer.g, inner.g), _kronecker(outer.at, inner.at)
    return _normalised(name, outer.m * step, outer.r * step, bt, g, at)


def split(first: Algorithm, second: Algorithm) -> Algorithm:
    """A filter in two pieces, each by an algorithm of its own, their products added up.

    It is one algorithm again: the points of both, the second reading `first.r` frames later.

    Raises: ValueError unless both have the same number of outputs.
    """
    if first.m != second.m:
        raise ValueError(f"split: {first.name} and {second.name} differ in outputs")

    def side_by_side(a: Matrix, b: Matrix, shift: int, width: int) -> list[list[Fraction]]:
        rows = [[*row, *[Fraction(0)] * (width - len(row))] for row in a]
        behind = width - shift - len(b[0])
        return rows + [[*[Fraction(0)] * shift, *row, *[Fraction(0)] * behind] for row in b]

    taps = first.r + second.r
    return _normalised(
        f"{first.name}+{second.name}",
        first.m,
        taps,
        side_by_side(first.bt, second.bt, first.r, first.m + taps - 1),
        side_by_side(first.g, second.g, first.r, taps),
        [[*a, *b] for a, b in zip(first.at, second.at, strict=True)],
    )


def supported(taps: int) -> tuple[str, ...]:
    """Names of the algorithms that serve a filter of `taps` taps, fastest first by products."""
    serving = [a for a in ALGORITHMS.values() if 1 <= taps <= a.r or (a.m == a.r and taps >= 1)]
    return tuple(a.name for a in sorted(serving, key=lambda a: (-a.saving(taps), a.name)))


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of prod (x - root), lowest order first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [a - root * b for a, b in zip(shifted, [*coefficients, 0], strict=True)]
    return coefficients


def _kronecker(a: Matrix, b: Matrix) -> list[list[Fraction]]:
    return [[x * y for x in row_a for y in row_b] for row_a in a for row_b in b]


def _normalised(name, m, r, bt, g, at) -> Algorithm:
    """Scale row k of B^T to primitive integers and row k of G by the inverse."""
    factors = []
    for row, filter_row in zip(bt, g, strict=True):
        multiple = math.lcm(*(c.denominator for c in row))
        divisor = math.gcd(*(int(c * multiple) for c in row))
        sign = 1 if next(c for c in filter_row if c) > 0 else -1
        factors.append(Fraction(sign * multiple, divisor))
    return Algorithm(
        name,
        m,
        r,
        bt=tuple(tuple(f * c for c in row) for f, row in zip(factors, bt, strict=True)),
        g=tuple(tuple(c / f for c in row) for f, row in zip(factors, g, strict=True)),
        at=tuple(map(tuple, at)),
    )


def _table() -> dict[str, Algorithm]:
    plain = {
        "direct": toom_cook("direct", 1, 1, ()),
        # with -1 for 1, inputs that are never negative would fill one point far more than the rest
        "F(2,2)": toom_cook("F(2,2)", 2, 2, (0, 1)),
    }
    lavin = (0, 1, -1, 2, -2)
    best = (0, "3/2", "-3/2", "2/3", "-2/3")  # of 6-point sets over small fractions
    eight = (*lavin, "1/2", "-1/2")
    points = {
        (2, 3): (0, 1, -1),
        (3, 2): (0, 1, -1),
        (4, 2): (0, 1, -2, "-1/2"),
        (3, 3): (0, 1, -2, "-1/2"),
        (4, 3): best,
        (6, 3): eight,
        (2, 4): (0, 1, -2, "-2/3"),
        (3, 4): best,
        (4, 4): (*lavin, "-1/3"),
        (2, 5): best,
        (4, 5): eight,
        (2, 7): eight,
    }
    for (m, r), finite in points.items():
        name = f"F({m},{r})"
        plain[name] = toom_cook(name, m, r, finite)
    for m, r in ((4, 3), (2, 5)):  # smaller integers in B^T, for transforms without a new scale
        name = f"F({m},{r})-lavin"
        plain[name] = toom_cook(name, m, r, lavin)
    pairs = {
        "N44": ("F(2,2)", "F(2,2)"),
        "N48": ("F(2,4)", "F(2,2)"),
        "N66": ("F(3,3)", "F(2,2)"),
        "N69": ("F(2,3)", "F(3,3)"),
        "N88": ("F(4,4)", "F(2,2)"),
    }
    halves = (
        ("F(2,3)", "F(2,2)"),
        ("F(3,3)", "F(3,2)"),
        ("F(4,3)", "F(4,2)"),
        ("F(3,4)", "F(3,3)"),
        ("F(4,4)", "F(4,3)"),
    )
    composed = [nested(name, plain[a], plain[b]) for name, (a, b) in pairs.items()]
    composed += [split(plain[a], plain[b]) for a, b in halves]
    return plain | {algorithm.name: algorithm for algorithm in composed}


ALGORITHMS: dict[str, Algorithm] = _table()
"""Every algorithm by name: "direct" (F(1,1)), plain F(m,r), nested N.. (m, then r) and
split F(m,r1)+F(m,r2), with points chosen for little noise; "-lavin" has the integer points of
Lavin and Gray instead."""
