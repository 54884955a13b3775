"""Every name in a shape is a size: used, unused, the length of a loop, or refused in one line."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jaxtyping import Array, Float, Int

from cmjax.cost import price, price_function
from cmjax.hardware import load_machine
from cmjax.program import SymbolicSize, trace

M = load_machine("cloudmatrix384")
n, m = jax.export.symbolic_shape("n, m")


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def recurrent(x: Float[Array, "n m"]):
    return lax.scan(lambda h, row: (jnp.tanh(h + row), None), x[0], x)[0]


def mapped(x: Float[Array, "n m"]):
    return lax.map(jnp.sin, x)


def counted(x: Float[Array, "n m"]):
    return lax.fori_loop(0, x.shape[0], lambda i, y: jnp.sin(y), x)


def branching(x: Float[Array, "n m"]):
    return jnp.sin(x) if x.shape[0] > 4 else x


def halved(x: Float[Array, "2*n m"]):
    return lax.map(jnp.sin, x.reshape(-1, 2, x.shape[1]))


LOOPS = {
    "scan": (recurrent, lambda n, m: n * m),
    "map": (mapped, lambda n, m: n * m),
    "fori_loop": (counted, lambda n, m: n * n * m),
    "a branch of Python": (branching, lambda n, m: n * m),
    "map over half an axis": (halved, lambda n, m: 2 * n * m),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_size_that_must_be_a_number_is_one(name):
    fn, transcendentals = LOOPS[name]
    timeline = price_function(fn, M, n=24, m=10)
    totals = timeline.program.totals({"m": 10.0})
    assert totals["transcendentals"] == transcendentals(24, 10)
    again = price_function(fn, M, n=6, m=10)
    assert again.program.totals({"m": 10.0})["transcendentals"] == transcendentals(6, 10)


def test_other_sizes_stay_symbols_and_keep_their_gradients():
    def total(m):
        return price_function(mapped, M, n=3, m=m).total_s

    with jax.enable_x64(True):
        slope = float(jax.grad(total)(1e6))
        assert slope == pytest.approx(float(total(2e6) - total(1e6)) / 1e6, rel=1e-6)
    assert slope > 0


def test_trace_takes_the_number_from_where_choices_are_made():
    program = trace(recurrent, array(n, m), at={"n": 7, "m": 100})
    assert program.symbols == {"m"} and program.inputs == {"n", "m"}
    assert [op.loop.length for op in program.operations if op.loop] == [7]
    assert float(price(program, M, {"n": 7, "m": 100.0}).total_s) > 0


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: trace(recurrent, array(n, m)),
            "scan or map in scope top over n elements: the length of a loop must be a number; "
            "trace with one for n",
        ),
        (
            lambda: price_function(recurrent, M, m=4),
            "scan or map in scope top over n elements: the length of a loop must be a number; "
            "trace with one for n",
        ),
        (
            lambda: jax.grad(lambda n: price_function(recurrent, M, n=n, m=4).total_s)(8.0),
            "scan or map in scope top over n elements: the length of a loop must be a number; "
            "trace with one for n",
        ),
        (
            lambda: price_function(recurrent, M, n=2.5, m=4),
            "size 'n' must be a whole number, as the program's loops or branches depend on it; "
            "got 2.5",
        ),
        (
            lambda: trace(branching, array(n, m)),
            "the program needs its sizes as numbers: Symbolic dimension comparison 'n' > '4' is "
            "inconclusive",
        ),
    ],
)
def test_where_there_is_no_number_one_line_says_so(call, message):
    with pytest.raises(ValueError) as found:
        call()
    assert str(found.value).splitlines()[0] == message


def test_an_error_of_the_function_itself_stays_what_it_is():
    def wrong(x: Float[Array, "n m"]):
        return x @ x.T @ jnp.ones((3, 3))

    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        trace(wrong, array(4, 5))
    with pytest.raises(SymbolicSize):
        trace(lambda x: jnp.zeros(int(x.shape[0])), array(n))


def test_a_size_that_nothing_depends_on_is_still_a_size():
    def lookup(table: Float[Array, "rows 64"], index: Int[Array, "n"]):
        return table[index]

    few, many = (price_function(lookup, M, rows=rows, n=128) for rows in (10, 10_000))
    assert float(few.total_s) == float(many.total_s) > 0
    message = "price: the program has no size 'row'; it has ['rows']"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        price_function(lookup, M, row=10, n=128)
    assert float(price_function(lookup, M, n=128).total_s) == float(few.total_s)


@pytest.mark.parametrize("axis", ["*batch", "...", "#n", "_", "?n"])
def test_a_shape_without_a_fixed_number_of_axes_is_refused(axis):
    def fn(x):
        return x

    fn.__annotations__["x"] = Float[Array, f"{axis} 8"]
    message = f"program 'fn': parameter 'x' has the axis '{axis}' in its shape '{axis} 8'; to be"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        price_function(fn, M)


def test_a_named_number_is_a_number():
    def fn(x: Float[Array, "n heads=8"]):
        return jnp.sin(x)

    assert price_function(fn, M, n=16).program.totals({"n": 16.0})["transcendentals"] == 128
