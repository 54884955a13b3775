"""Control flow, transformations, marks and unknown primitives, as programs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive

from cmjax.mesh import RANKED, RankMesh, on_every_rank
from cmjax.program import Stream, UnpricedPrimitive, Work, cost_rule, stream, trace, trip_count
from cmjax.program.mark import parse_stream
from cmjax.program.rules import RULES

F32 = jnp.float32
N = 8 * 16


def array(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


X, W = array(8, 16), array(16, 16)
PRODUCT = 2 * 8 * 16 * 16


@pytest.mark.parametrize("cheap_first", [True, False])
def test_a_cond_costs_its_costlier_branch(cheap_first):
    def branches(flag, x, w):
        cheap, costly = (lambda x, w: x + 1.0), (lambda x, w: jnp.tanh(x @ w))
        return lax.cond(flag, *((cheap, costly) if cheap_first else (costly, cheap)), x, w)

    totals = trace(branches, array(dtype=bool), X, W).totals({})
    assert totals["cube_flops_32bit"] == PRODUCT
    assert totals["flops"] == PRODUCT
    assert totals["transcendentals"] == N


def test_a_switch_costs_its_costliest_branch():
    def switch(i, x):
        return lax.switch(i, [jnp.negative, lambda x: jnp.exp(jnp.exp(jnp.exp(x))), jnp.exp], x)

    # One pass over HBM each: the branch with most FLOP and bytes is the one that counts most.
    totals = trace(switch, array(dtype=jnp.int32), X).totals({})
    assert totals["read_bytes"] - 4 <= N * 4 <= totals["read_bytes"]


def doubled(x):
    def grows(state):
        return jnp.max(state[1]) < 100.0

    return lax.while_loop(grows, lambda s: (s[0] + 1, jnp.exp(s[1])), (0, x))[1]


def test_a_while_loop_without_trip_count_is_refused():
    message = (
        "while loop in scope top has no known trip count: use lax.scan or lax.fori_loop with fixed "
        "bounds, or wrap it in trip_count(n)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trace(doubled, X)
    with pytest.raises(ValueError, match=r"^while loop in scope outer/inner has no"):
        trace(jax.named_scope("outer")(lambda x: jax.named_scope("inner")(doubled)(x)), X)


@pytest.mark.parametrize("trips", [1, 7])
def test_a_while_loop_is_its_body_times_the_declared_trip_count(trips):
    def declared(x):
        with trip_count(trips):
            return doubled(x)

    program = trace(jax.jit(declared), X)
    assert program.totals({})["transcendentals"] == trips * N
    assert [op.loop.length for op in program.operations if op.loop] == [trips]


def test_a_while_loop_inside_a_declared_one_needs_a_trip_count_of_its_own():
    def nested(x, *, inner):
        def body(x):
            if inner is None:
                return doubled(x)
            with trip_count(inner):
                return doubled(x)

        with trip_count(5):
            return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, body(s[1])), (0, x))[1]

    assert trace(functools.partial(nested, inner=3), X).totals({})["transcendentals"] == 15 * N
    with pytest.raises(ValueError, match="has no known trip count"):
        trace(functools.partial(nested, inner=None), X)


def test_a_trip_count_is_a_positive_number():
    with (
        pytest.raises(ValueError, match=r"^trip_count: iterations must be at least 1, got 0$"),
        trip_count(0),
    ):
        pass


def test_a_fori_loop_with_fixed_bounds_knows_its_trip_count():
    program = trace(lambda x: lax.fori_loop(2, 9, lambda i, x: jnp.exp(x), x), X)
    assert program.totals({})["transcendentals"] == 7 * N


@pytest.mark.parametrize("length", [1, 2, 61, 1000])
def test_a_program_does_not_grow_with_depth(length):
    def model(x, ws):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    program = trace(model, X, array(length, 16, 16))
    assert sum(len(level.operations) for level, _ in program.levels) == 3
    assert program.totals({})["cube_flops_32bit"] == length * PRODUCT


def test_nested_scans_multiply():
    def grid(x):
        def inner(x, _):
            return jnp.exp(x), None

        def outer(x, _):
            return lax.scan(inner, x, length=3)[0], None

        return lax.scan(outer, x, length=5)[0]

    program = trace(grid, X)
    assert program.totals({})["transcendentals"] == 15 * N
    assert [times for _, times in program.levels] == [1, 5, 15]


def two_streams(x, w):
    with stream("left", cube=8, vector=16):
        h = x @ w
    with stream("right"), jax.named_scope("second"):
        return jnp.tanh(h) @ w


MESH = RankMesh(2, 2, 2)
TRANSFORMS = {
    "none": (lambda f: f, (X, W)),
    "jit": (jax.jit, (X, W)),
    "vmap": (lambda f: jax.vmap(f, (0, None)), (array(5, 8, 16), W)),
    "jit of vmap": (lambda f: jax.jit(jax.vmap(f, (0, None))), (array(5, 8, 16), W)),
    "scan": (
        lambda f: lambda x, ws: lax.scan(lambda x, w: (f(x, w), None), x, ws),
        (X, array(3, 16, 16)),
    ),
    "remat": (jax.checkpoint, (X, W)),
    "grad": (lambda f: jax.grad(lambda x, w: jnp.sum(f(x, w)), (0, 1)), (X, W)),
    "grad of remat of jit": (
        lambda f: jax.grad(lambda x, w: jnp.sum(jax.checkpoint(jax.jit(f))(x, w)), (0, 1)),
        (X, W),
    ),
    "shard_map": (
        lambda f: on_every_rank(f, MESH, (RANKED, RANKED), RANKED, abstract=True),
        (array(8, 8, 16), array(8, 16, 16)),
    ),
    "vmap in shard_map": (
        lambda f: on_every_rank(
            jax.vmap(f, (0, None)), MESH, (RANKED, RANKED), RANKED, abstract=True
        ),
        (array(8, 5, 8, 16), array(8, 16, 16)),
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_stream_marks_survive_every_transformation(transform):
    lift, args = TRANSFORMS[transform]
    program = trace(lift(two_streams), *args)
    operations = [op for level, _ in program.levels for op in level.operations if op.loop is None]
    products = {op.stream for op in operations if op.name == "dot_general"}
    assert products == {Stream("left", 8, 16), Stream("right", None, None)}
    second = {op.scope[-1] for op in operations if op.stream.name == "right" and op.scope}
    assert second == {"second"}


def test_a_stream_mark_reads_back_as_written():
    seen = jax.make_jaxpr(two_streams)(X, W).jaxpr.eqns
    parts = str(seen[0].source_info.name_stack).split("/")
    assert parse_stream(parts[0]) == ("left", 8, 16)
    assert parse_stream("second") is None


def test_the_innermost_stream_counts():
    def nested(x):
        with stream("outer", cube=4):
            x = jnp.tanh(x)
            with stream("inner", vector=2):
                return jnp.sum(jnp.exp(x))

    assert [op.stream for op in trace(nested, X).operations] == [
        Stream("outer", 4, None),
        Stream("inner", None, 2),
    ]


@pytest.mark.parametrize(
    "name, cores, message",
    [
        ("a b", {}, "stream: name must be letters, digits, '_' or '-', got 'a b'"),
        ("", {}, "stream: name must be letters, digits, '_' or '-', got ''"),
        ("a/b", {}, "stream: name must be letters, digits, '_' or '-', got 'a/b'"),
        ("a", {"cube": 0}, "stream: cube must be at least 1 core, got 0"),
        ("a", {"vector": -1}, "stream: vector must be at least 1 core, got -1"),
    ],
)
def test_a_malformed_stream_is_refused(name, cores, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"), stream(name, **cores):
        pass


def test_an_unknown_primitive_is_an_error_that_says_how_to_price_it():
    mystery_p = Primitive("mystery_of_test")
    mystery_p.def_abstract_eval(lambda x, *, power: x)

    def fn(x):
        return mystery_p.bind(x, power=3) + 1.0

    message = (
        "primitive 'mystery_of_test' has no cost rule; register one with "
        '@cmjax.program.cost_rule("mystery_of_test") returning the Work of one call'
    )
    with pytest.raises(UnpricedPrimitive, match=f"^{re.escape(message)}$"):
        trace(fn, X)
    try:

        @cost_rule(mystery_p)
        def rule(x, *, out, mesh, power):
            assert out[0].shape == x.shape and mesh == {}
            return Work(vector_bytes=x.nbytes * power, flops=x.size)

        program = trace(fn, X)
        assert [op.name for op in program.operations] == ["mystery_of_test", "add"]
        assert program.operations[0].work.vector_bytes == 3 * N * 4
        # HBM is charged at the boundary unless the rule says otherwise.
        assert program.operations[0].work.read_bytes == N * 4
    finally:
        RULES.pop(mystery_p.name)
    with pytest.raises(UnpricedPrimitive):
        trace(fn, X)


def test_a_missing_or_partial_result_of_a_loop_keeps_its_dependencies():
    def model(x, ws):
        x, each = lax.scan(lambda x, w: (jnp.tanh(x @ w), jnp.sum(x)), x, ws)
        return jnp.exp(x), jnp.exp(each)

    program = trace(model, X, array(5, 16, 16))
    loop = next(i for i, op in enumerate(program.operations) if op.loop)
    waits = {s.index for op in program.operations for s in op.sources if s.op == loop}
    assert waits == {0, 1}


def test_totals_add_up_over_streams_scopes_and_levels():
    program = trace(
        lambda x, ws: lax.scan(lambda x, w: (two_streams(x, w), None), x, ws)[0],
        X,
        array(4, 16, 16),
    )
    assert program.streams == ("left", "main", "right")
    assert program.totals({})["cube_flops_32bit"] == 4 * 2 * PRODUCT
    by_hand = np.zeros(())
    for level, times in program.levels:
        by_hand = by_hand + times * sum(
            float(op.work.column("read_bytes").constant) for op in level.operations
        )
    assert program.totals({})["read_bytes"] == by_hand
