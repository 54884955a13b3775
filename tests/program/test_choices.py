"""Choices that depend on sizes: remembered, made again at other sizes, never silent."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from cmjax.cost import SizesApart, price, price_function
from cmjax.hardware import load_machine
from cmjax.program import Size, trace
from cmjax.program.choice import PROBE, Choices, broken

M = load_machine("cloudmatrix384")
N, K = Size.symbol("n"), Size.symbol("k")


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


n, k = jax.export.symbolic_shape("n, k")


def longer_of(flag, x, y):
    """A `cond` whose branches work on arrays of different sizes."""
    return lax.cond(flag, lambda: jnp.sum(jnp.exp(x)), lambda: jnp.sum(jnp.exp(jnp.exp(y))))


BRANCHES = (jax.ShapeDtypeStruct((), jnp.bool_), array(n), array(k))


def test_pairs_ordered_for_all_sizes_are_no_assumption():
    choices = Choices()
    assert choices.at_most(N * 8, N * 128) and not choices.at_most(N * N + 1, N * N)
    assert choices.at_most(Size(3), Size(4)) and choices.at_most(N, N)
    assert not choices.assumed


def test_other_pairs_are_ordered_at_the_point_and_remembered():
    choices = Choices()
    assert not choices.at_most(N, Size(100)) and choices.at_most(N, K * 2)
    assert list(choices.assumed) == [(Size(100), N), (N, K * 2)]
    there = Choices({"n": 10.0})
    assert there.at_most(N, Size(100)) and list(there.assumed) == [(N, Size(100))]
    assert Choices({"n": 3.0}).largest([N, Size(2), N * 2, N * 2]) == 2
    assert PROBE == 1024


def test_a_broken_assumption_is_told_once_all_its_sizes_are_known():
    assumed = ((Size(100), N), (N, K * 2))
    assert broken(assumed, {"n": 200.0, "k": 100.0}) == []
    assert broken(assumed, {"n": 10.0, "k": 100.0}) == ["100 <= n"]
    assert broken(assumed, {"n": 201.0, "k": 100.0}) == ["n <= 2*k"]
    assert broken(assumed, {"n": 201.0}) == []
    assert broken(((Size(1), N),), {"n": 0.25}) == []  # a mean load below 1 is still an array


@pytest.mark.parametrize("sizes", [{"n": 8.0, "k": 4000.0}, {"n": 8000.0, "k": 4.0}])
def test_the_branch_that_is_costlier_at_the_sizes_is_charged(sizes):
    program = trace(longer_of, *BRANCHES).decided_at(sizes)
    want = {"n": sizes["n"], "k": 2 * sizes["k"]}
    costlier = "n" if sizes["n"] > sizes["k"] else "k"
    assert program.totals(sizes)["transcendentals"] == want[costlier]
    assert trace(longer_of, *BRANCHES, at=sizes).totals(sizes) == program.totals(sizes)
    assert program.broken_assumptions(sizes) == []
    # As the program of the same function at these shapes.
    shapes = (BRANCHES[0], array(int(sizes["n"])), array(int(sizes["k"])))
    assert program.totals(sizes) == trace(longer_of, *shapes).totals({})


def test_a_price_at_sizes_that_choose_otherwise_says_so():
    program = trace(longer_of, *BRANCHES)
    near, far = {"n": 500.0, "k": 1000.0}, {"n": 1e5, "k": 4.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        price(program, M, near)
        price(program.decided_at(far), M, far)
    with pytest.warns(SizesApart, match=r"which does not hold here; price program\.decided_at"):
        price(program, M, far)


def test_a_function_is_priced_with_the_choices_of_its_sizes():
    args = BRANCHES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sizes in ({"n": 1e5, "k": 4.0}, {"n": 4.0, "k": 1e5}, {"n": 1e5, "k": 4.0}):
            timeline = price_function(longer_of, M, args=args, **sizes)
            assert float(timeline.flops) == pytest.approx(
                trace(longer_of, *BRANCHES, at=sizes).totals(sizes)["flops"]
            )


def test_fusion_follows_the_sizes():
    def grows(row, x):
        return jnp.exp(row)[None] * x  # the row joins the kernel of x only where x is larger

    args = array(n), array(k, n)
    large = trace(grows, *args)
    assert len(large.operations) == 1 and large.assumed
    assert large.decided_at({"n": 5.0, "k": 3.0}) is large

    long, short = jax.export.symbolic_shape("long, short", constraints=["long >= short"])

    def head(x, y):
        return lax.slice_in_dim(jnp.exp(x), 0, y.shape[0]) * y

    program = trace(head, array(long), array(short))
    apart = program.decided_at({"long": 64.0, "short": 8.0})
    assert [op.name for op in program.operations] == ["exp+mul"]
    assert [op.name for op in apart.operations] == ["exp", "mul"]
    assert apart.totals({"long": 64.0, "short": 8.0}) == trace(head, array(64), array(8)).totals({})


def test_a_program_with_some_sizes_fixed_still_knows_its_choices():
    program = trace(longer_of, *BRANCHES).at(k=4.0)
    assert program.symbols == set() and program.inputs == {"n"}
    assert program.broken_assumptions({"n": 1e5})
    decided = program.decided_at({"n": 1e5})
    assert decided.totals({"n": 1e5})["transcendentals"] == 1e5
    assert decided.symbols == {"n"}
