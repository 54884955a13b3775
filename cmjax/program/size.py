"""Symbolic sizes as polynomials that are evaluated at real numbers, so they carry gradients.

A traced program has shapes such as `[384*b, 7168]`. JAX writes those as integer expressions;
here they become polynomials over named symbols: `384*b*c + 2`. Integer division is read as true
division and remainders as zero, the continuous relaxation under which a price is differentiable.
"""

import ast
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

Monomial = tuple[tuple[Any, int], ...]
"""Sorted (atom, power) pairs; an atom is a symbol's name, or a `Max`, `Min`, `Ratio` or `Log2`."""


class Size:
    """A polynomial with real coefficients over symbols. Immutable and hashable."""

    __slots__ = ("_hash", "terms")

    def __init__(self, terms: dict[Monomial, float] | float = 0.0):
        if isinstance(terms, dict):
            self.terms = {m: c for m, c in terms.items() if c != 0}
        else:
            self.terms = {(): float(terms)} if terms else {}
        self._hash: int | None = None  # few are ever looked up

    @staticmethod
    def symbol(name: str) -> "Size":
        return Size({((name, 1),): 1.0})

    @staticmethod
    def of(value: object) -> "Size":
        """Read a dimension: an int, a float, a `Size` or a JAX symbolic dimension."""
        if isinstance(value, Size):
            return value
        if isinstance(value, int | float):
            return Size(value)
        return _from_text(str(value))

    @property
    def constant(self) -> float | None:
        """The value, if no symbol is in it."""
        if not self.terms:
            return 0.0
        return self.terms.get(()) if len(self.terms) == 1 else None

    def symbols(self) -> set[str]:
        names = set()
        for monomial in self.terms:
            for atom, _ in monomial:
                names |= {atom} if isinstance(atom, str) else atom.symbols()
        return names

    def evaluate(self, values: Mapping[str, Any]):
        """The polynomial at `values` (floats or JAX scalars)."""
        total = 0.0
        for monomial, coefficient in self.terms.items():
            total = total + coefficient * evaluate_monomial(monomial, values)
        return total

    def fix(self, values: Mapping[str, float]) -> "Size":
        """The polynomial with some symbols replaced by numbers."""
        total = Size()
        for monomial, coefficient in self.terms.items():
            factors = [
                Size(values[a])
                if isinstance(a, str) and a in values
                else Size({((a, 1),): 1.0})
                if isinstance(a, str)
                else a.fix(values)
                for a, _ in monomial
            ]
            term = Size(coefficient)
            for factor, (_, power) in zip(factors, monomial, strict=True):
                base = factor if power > 0 else Size(1.0) / factor
                term = product([term, *[base] * abs(power)])
            total = total + term
        return total

    def __add__(self, other):
        other = Size.of(other)
        if not other.terms or not self.terms:
            return self if self.terms else other
        terms = dict(self.terms)
        for monomial, coefficient in other.terms.items():
            terms[monomial] = terms.get(monomial, 0.0) + coefficient
        return Size(terms)

    def __mul__(self, other):
        other = Size.of(other)
        terms: dict[Monomial, float] = {}
        for left, a in self.terms.items():
            for right, b in other.terms.items():
                product = _times(left, right)
                terms[product] = terms.get(product, 0.0) + a * b
        return Size(terms)

    def __truediv__(self, other):
        other = Size.of(other)
        if other.constant is not None:
            return self * (1.0 / other.constant)
        if len(other.terms) == 1:
            ((monomial, coefficient),) = other.terms.items()
            inverse = tuple((atom, -power) for atom, power in monomial)
            return self * Size({inverse: 1.0 / coefficient})
        return Size({((Ratio(self, other), 1),): 1.0})

    def __sub__(self, other):
        return self + Size.of(other) * -1.0

    def __rsub__(self, other):
        return Size.of(other) - self

    __radd__ = __add__
    __rmul__ = __mul__

    def __eq__(self, other):
        return isinstance(other, Size | int | float) and self.terms == Size.of(other).terms

    def __hash__(self):
        if self._hash is None:
            self._hash = hash(frozenset(self.terms.items()))
        return self._hash

    def __reduce__(self):
        return Size, (self.terms,)  # hashes of strings differ from process to process

    def __repr__(self):
        if not self.terms:
            return "0"
        return " + ".join(
            "*".join(
                [f"{c:g}"] * (c != 1 or not m) + [f"{a}^{p}" if p != 1 else f"{a}" for a, p in m]
            )
            for m, c in self.terms.items()
        )


class _Operation:
    """A function of two sizes that is no polynomial; it is an atom of polynomials."""

    def __init__(self, left: Size, right: Size):
        self.left, self.right = left, right

    def symbols(self) -> set[str]:
        return self.left.symbols() | self.right.symbols()

    def __eq__(self, other):
        same = type(self) is type(other)
        return same and (self.left, self.right) == (other.left, other.right)

    def __hash__(self):
        return hash((type(self).__name__, self.left, self.right))

    def __repr__(self):
        return f"{type(self).__name__.lower()}({self.left}, {self.right})"


class Max(_Operation):
    def fix(self, values):
        return maximum(self.left.fix(values), self.right.fix(values))

    def evaluate(self, values):
        return _pick(max, jnp.maximum, self.left.evaluate(values), self.right.evaluate(values))


class Min(_Operation):
    def fix(self, values):
        return minimum(self.left.fix(values), self.right.fix(values))

    def evaluate(self, values):
        return _pick(min, jnp.minimum, self.left.evaluate(values), self.right.evaluate(values))


class Ratio(_Operation):
    def fix(self, values):
        return self.left.fix(values) / self.right.fix(values)

    def evaluate(self, values):
        return self.left.evaluate(values) / self.right.evaluate(values)


class Log2:
    """The base-2 logarithm of a size, at least 1; an atom of polynomials."""

    def __init__(self, of: Size):
        self.of = of

    def symbols(self) -> set[str]:
        return self.of.symbols()

    def fix(self, values):
        return log2(self.of.fix(values))

    def evaluate(self, values):
        value = self.of.evaluate(values)
        if isinstance(value, float | int):
            return math.log2(max(value, 2.0))
        return jnp.log2(jnp.maximum(value, 2.0))

    def __eq__(self, other):
        return isinstance(other, Log2) and self.of == other.of

    def __hash__(self):
        return hash(("log2", self.of))

    def __repr__(self):
        return f"log2({self.of})"


def _pick(plain, traced, left, right):
    """Of two numbers, without JAX if both are Python's: a program may be traced inside a jit."""
    is_plain = isinstance(left, float | int) and isinstance(right, float | int)
    return plain(left, right) if is_plain else traced(left, right)


def maximum(left: Size, right: Size) -> Size:
    """The larger of two sizes."""
    left, right = Size.of(left), Size.of(right)
    if left.constant is not None and right.constant is not None:
        return Size(max(left.constant, right.constant))
    return Size({((Max(left, right), 1),): 1.0})


def minimum(left: Size, right: Size) -> Size:
    """The smaller of two sizes."""
    left, right = Size.of(left), Size.of(right)
    if left.constant is not None and right.constant is not None:
        return Size(min(left.constant, right.constant))
    return Size({((Min(left, right), 1),): 1.0})


def log2(size: Size) -> Size:
    """The base-2 logarithm of a size, at least 1: passes of a sort or of a Fourier transform."""
    size = Size.of(size)
    if size.constant is not None:
        return Size(math.log2(max(2.0, size.constant)))
    return Size({((Log2(size), 1),): 1.0})


def product(sizes: Iterable[object]) -> Size:
    """The product of dimensions; 1 for none."""
    return functools.reduce(lambda a, b: a * Size.of(b), sizes, Size(1.0))


def evaluate_monomial(monomial: Monomial, values: Mapping[str, Any]):
    """One product of powers at `values`."""
    total = 1.0
    for atom, power in monomial:
        factor = values[atom] if isinstance(atom, str) else atom.evaluate(values)
        total = total * factor**power
    return total


def _times(left: Monomial, right: Monomial) -> Monomial:
    if not left or not right:
        return left or right
    powers: dict[Any, int] = dict(left)
    for atom, power in right:
        powers[atom] = powers.get(atom, 0) + power
    return tuple(sorted(((a, p) for a, p in powers.items() if p), key=lambda ap: str(ap[0])))


@functools.lru_cache(maxsize=4096)
def _from_text(text: str) -> Size:
    """Parse the notation in which JAX prints (and reads) symbolic dimensions."""
    return _from_tree(ast.parse(text.replace("^", "**"), mode="eval").body, text)


def _from_tree(tree: ast.AST, text: str) -> Size:
    match tree:
        case ast.Constant(value=int(value)):
            return Size(value)
        case ast.Name(id=name):
            return Size.symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _from_tree(operand, text) * -1.0
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(power))):
            return product([_from_tree(left, text)] * power)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _from_tree(left, text), _from_tree(right, text)
            if isinstance(op, ast.Add):
                return a + b
            if isinstance(op, ast.Sub):
                return a - b
            if isinstance(op, ast.Mult):
                return a * b
        case ast.Call(func=ast.Name(id=name), args=[left, right]):
            a, b = _from_tree(left, text), _from_tree(right, text)
            if name == "floordiv":
                return a / b
            if name == "mod":
                return Size(0.0)
            if name in ("max", "min"):
                return maximum(a, b) if name == "max" else minimum(a, b)
    raise ValueError(f"cannot read the symbolic size {text!r}")
