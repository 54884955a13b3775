"""Symbolic sizes against Python's own arithmetic."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.program import Size, maximum, minimum
from cmjax.program.size import product

NAMES = ("a", "b", "c")
VALUES = st.fixed_dictionaries({name: st.integers(1, 9) for name in NAMES})
LEAVES = st.one_of(
    st.sampled_from(NAMES).map(lambda n: (Size.symbol(n), lambda v: Fraction(v[n]))),
    st.integers(-5, 5).map(lambda k: (Size(k), lambda v: Fraction(k))),
)
OPERATIONS = {
    "+": (lambda x, y: x + y, lambda x, y: x + y),
    "-": (lambda x, y: x - y, lambda x, y: x - y),
    "*": (lambda x, y: x * y, lambda x, y: x * y),
    "max": (maximum, max),
    "min": (minimum, min),
}


def _joined(children):
    def join(name, left, right):
        size, number = OPERATIONS[name]
        return size(left[0], right[0]), lambda v: number(left[1](v), right[1](v))

    return st.builds(join, st.sampled_from(sorted(OPERATIONS)), children, children)


EXPRESSIONS = st.recursive(LEAVES, _joined, max_leaves=6)


@settings(max_examples=150)
@given(EXPRESSIONS, VALUES)
def test_size_algebra_is_pythons(expression, values):
    # Six leaves of at most 9 stay below 9**6 * 2**6 < 2**53: float64 holds every step exactly.
    size, number = expression
    with jax.enable_x64(True):
        assert float(size.evaluate(values)) == number(values)


@settings(max_examples=100)
@given(EXPRESSIONS, EXPRESSIONS, VALUES)
def test_division_is_true_division(above, below, values):
    if below[1](values) == 0 or below[0].constant == 0:
        return
    with jax.enable_x64(True):
        got = float((above[0] / below[0]).evaluate(values))
    # Every sum inside is exact; what is left are a product and a quotient per term.
    parts = sum(abs(c) * 9.0 ** sum(abs(p) for _, p in m) for m, c in above[0].terms.items())
    want = above[1](values) / below[1](values)
    assert got == pytest.approx(float(want), rel=1e-13, abs=1e-13 * parts)


@settings(max_examples=100)
@given(EXPRESSIONS, VALUES, st.sets(st.sampled_from(NAMES)))
def test_fixing_some_symbols_leaves_a_size_of_the_others(expression, values, chosen):
    size, number = expression
    fixed = size.fix({name: float(values[name]) for name in chosen})
    assert not fixed.symbols() & chosen
    rest = {name: values[name] for name in NAMES if name not in chosen}
    with jax.enable_x64(True):
        assert float(fixed.evaluate(rest)) == number(values)


def test_fixing_reaches_into_quotients_of_sums():
    a, b = Size.symbol("a"), Size.symbol("b")
    size = (a + 6) / (a + b) + a / b
    assert size.fix({"a": 2.0, "b": 2.0}) == Size(3.0)
    half = size.fix({"a": 2.0})
    assert half.symbols() == {"b"}
    assert half.evaluate({"b": 2.0}) == 3.0


@given(EXPRESSIONS, EXPRESSIONS)
def test_equal_sizes_are_equal_and_hash_alike_in_any_order(x, y):
    x, y = x[0], y[0]
    for left, right in ((x + y, y + x), (x * y, y * x), (x - y, (y - x) * -1.0)):
        assert left == right and hash(left) == hash(right)
    assert x - x == 0


def test_a_product_of_no_dimensions_is_one():
    assert product([]) == 1
    assert product([2, Size.symbol("a"), 3.5]) == Size.symbol("a") * 7.0


def test_constants_know_that_they_are():
    assert Size(3).constant == 3
    assert Size().constant == 0
    assert Size.symbol("a").constant is None
    assert (Size.symbol("a") + 1).constant is None
    assert (Size.symbol("a") - Size.symbol("a") + 2).constant == 2


def test_a_size_prints_as_what_it_is():
    a, b = Size.symbol("a"), Size.symbol("b")
    assert repr(a * a * 3 + b / 2 + 1) == "3*a^2 + 0.5*b + 1"
    assert repr(maximum(a, b)) == "max(a, b)"
    assert repr(Size()) == "0"


JAX_DIMENSIONS = {
    "sum": lambda a, b, **_: 3 * a + b - 7,
    "powers": lambda a, b, **_: a**3 * b**2 + 2 * a * a,
    "leading minus": lambda a, b, **_: 5 - a,
    "exact quotient": lambda a, b, **_: (a * b) // 4,
    "quotient of a sum": lambda a, b, **_: (a + b) // 2,
    "symbolic quotient": lambda a, b, **_: (a * a + a * b) // (a + b),
    "remainder": lambda a, b, **_: a + (a * b) % 4,
    "max": lambda a, b, max, min: max(a, 2 * b),
    "min": lambda a, b, max, min: min(a + 1, b) * 3,
    "nested": lambda a, b, max, min: max((a + b) // 2, min(a, b)) * a,
}


@pytest.mark.parametrize("case", JAX_DIMENSIONS)
@pytest.mark.parametrize("values", [{"a": 8, "b": 12}, {"a": 12, "b": 4}, {"a": 20, "b": 20}])
def test_jax_symbolic_dimensions_are_read(case, values):
    # The values divide everything that is divided, where // is / and % is 0.
    function = JAX_DIMENSIONS[case]
    a, b = jax.export.symbolic_shape("a, b")
    size = Size.of(function(a=a, b=b, max=jax.core.max_dim, min=jax.core.min_dim))
    assert float(size.evaluate(values)) == function(**values, max=max, min=min)


def test_integer_division_relaxes_to_a_differentiable_quotient():
    (a,) = jax.export.symbolic_shape("a")
    size = Size.of(a // 8)
    assert size.evaluate({"a": 20.0}) == 2.5
    assert jax.grad(lambda x: size.evaluate({"a": x}))(20.0) == 1 / 8


def test_what_is_no_dimension_is_refused_by_its_text():
    with pytest.raises(ValueError, match=r"^cannot read the symbolic size 'f\(a\)'$"):
        Size.of("f(a)")


def test_sizes_are_differentiable_and_batch():
    a, b = Size.symbol("a"), Size.symbol("b")
    size = a * a * b + maximum(a, b) / b
    with jax.enable_x64(True):
        gradient = jax.grad(lambda v: size.evaluate(v))({"a": 3.0, "b": 2.0})
        assert float(gradient["a"]) == pytest.approx(2 * 3 * 2 + 1 / 2, rel=1e-15)
        assert float(gradient["b"]) == pytest.approx(9 - 3 / 4, rel=1e-15)
        many = jax.vmap(lambda x: size.evaluate({"a": x, "b": 2.0}))(jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(many, [3.0, 19.5], rtol=1e-15)
