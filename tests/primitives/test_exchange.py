"""Dispatch and combine against a dense NumPy computation, on one rank and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from cmjax.mesh import RANKED, RankMesh, on_every_rank
from cmjax.primitives.exchange import combine, dispatch, quantize_rows

MESHES = [RankMesh(2, 4), RankMesh(2, 2, 2)]
ALONE = {"axes": (), "ranks": 1, "slots_per_rank": 5}


def _case(ranks, held, tokens=6, copies=3, hidden=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ranks, tokens, hidden)).astype(np.float32)
    slots = rng.integers(0, ranks * held, size=(ranks, tokens, copies)).astype(np.int32)
    weights = rng.normal(size=(ranks, tokens, copies)).astype(np.float32)
    return x, slots, weights


def _positions(slots):
    """How many earlier copies of the same rank go to the same slot, by counting."""
    flat = slots.reshape(slots.shape[0], -1)
    places = [[int((row[:i] == row[i]).sum()) for i in range(len(row))] for row in flat]
    return np.array(places).reshape(slots.shape)


def _round_trip(how, axes, **quantized):
    """Each slot multiplies its rows by its number plus one."""

    def fn(x, slots, weights, gain):
        sent = dispatch(x, slots, **quantized, **how)
        rank = jax.lax.axis_index(axes) if axes else 0
        held = how["slots_per_rank"]
        factor = (rank * held + jnp.arange(held) + 1.0) * gain
        rows = sent.rows * factor[:, None, None]
        return combine(rows, slots, sent.position, weights, **how), sent

    return fn


def _expected(x, slots, weights, capacity):
    kept = weights * (_positions(slots) < capacity)
    return (x[:, :, None] * (slots + 1.0)[..., None] * kept[..., None]).sum(2)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("virtual", [True, False])
@pytest.mark.parametrize("capacity", [1, 2, 18])
def test_round_trip_equals_the_dense_sum_and_counts_what_it_drops(mesh, virtual, capacity):
    x, slots, weights = _case(8, 2)
    how = {"axes": mesh.axes, "ranks": 8, "slots_per_rank": 2, "capacity": capacity}
    fn = _round_trip(how, mesh.axes)
    lifted = on_every_rank(lambda *a: fn(*a, 1.0), mesh, RANKED, RANKED, virtual=virtual)
    y, sent = jax.block_until_ready(jax.jit(lifted)(x, slots, weights))
    place = _positions(slots)
    np.testing.assert_allclose(y, _expected(x, slots, weights, capacity), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sent.position, place)
    np.testing.assert_array_equal(sent.dropped, (place >= capacity).sum((1, 2)))
    kept = place < capacity
    for rank in range(8):
        for source in range(8):
            for slot in range(2):
                want = (kept[source] & (slots[source] == rank * 2 + slot)).sum()
                assert sent.counts[rank, source, slot] == want
    assert sent.rows.shape == (8, 2, 8 * capacity, 4)
    np.testing.assert_array_equal(sent.scale, 1)


def test_a_row_lies_in_its_source_ranks_block_and_unused_rows_are_zero():
    mesh = RankMesh(2, 4)
    x, slots, _ = _case(8, 2)
    how = {"axes": mesh.axes, "ranks": 8, "slots_per_rank": 2, "capacity": 4}
    lifted = on_every_rank(lambda x, s: dispatch(x, s, **how), mesh, RANKED, RANKED)
    rows = np.asarray(jax.block_until_ready(jax.jit(lifted)(x, slots)).rows)
    want = np.zeros_like(rows)
    place = _positions(slots)
    for source, token, copy in np.ndindex(slots.shape):
        if place[source, token, copy] < 4:
            rank, slot = divmod(slots[source, token, copy], 2)
            want[rank, slot, source * 4 + place[source, token, copy]] = x[source, token]
    np.testing.assert_array_equal(rows, want)


def test_without_capacity_nothing_is_dropped_when_a_token_visits_a_slot_once():
    x, _, weights = _case(1, 5)
    slots = np.argsort(np.random.default_rng(1).random((6, 5)), axis=1)[:, :3]
    sent = dispatch(x[0], slots, **ALONE)
    assert int(sent.dropped) == 0
    y = combine(sent.rows, slots, sent.position, weights[0], **ALONE)
    np.testing.assert_allclose(y, x[0] * weights[0].sum(1, keepdims=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("virtual", [True, False])
def test_gradients_equal_those_of_the_dense_sum(mesh, virtual):
    x, slots, weights = _case(8, 2)
    how = {"axes": mesh.axes, "ranks": 8, "slots_per_rank": 2, "capacity": 2}
    fn = _round_trip(how, mesh.axes)
    lifted = on_every_rank(lambda *a: fn(*a, 1.0)[0], mesh, RANKED, RANKED, virtual=virtual)

    def loss(x, weights):
        return (lifted(x, slots, weights) ** 2).sum()

    def dense(x, weights):
        return (_expected(x, slots, weights, 2) ** 2).sum()

    got = jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1)))(x, weights))
    want = jax.grad(dense, (0, 1))(jnp.asarray(x), jnp.asarray(weights))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2)


def test_quantized_rows_are_within_half_a_step_and_carry_no_gradient():
    x, slots, _ = _case(1, 5, tokens=20, hidden=32)
    exact = dispatch(x[0], slots[0], **ALONE)
    coarse = dispatch(x[0], slots[0], quantize=True, **ALONE)
    assert coarse.rows.dtype == jnp.int8
    used = np.abs(np.asarray(exact.rows)).max(-1) > 0
    error = np.abs(coarse.rows * coarse.scale[..., None] - exact.rows)
    assert (error <= coarse.scale[..., None] / 2 * 1.001).all()
    assert error.max() > 0
    np.testing.assert_allclose(
        np.asarray(coarse.scale)[used],
        np.abs(np.asarray(exact.rows)).max(-1)[used] / 127,
        rtol=1e-6,
    )

    def loss(x):
        sent = dispatch(x, slots[0], quantize=True, **ALONE)
        return (sent.rows * sent.scale[..., None]).sum()

    np.testing.assert_array_equal(jax.grad(loss)(jnp.asarray(x[0])), 0)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("virtual", [True, False])
def test_restored_rows_are_floats_and_rounding_is_passed_straight_through(mesh, virtual):
    x, slots, weights = _case(8, 2)
    how = {"axes": mesh.axes, "ranks": 8, "slots_per_rank": 2, "capacity": 2}

    def lifted(**quantized):
        fn = _round_trip(how, mesh.axes, **quantized)
        return on_every_rank(lambda *a: fn(*a, 1.0)[0], mesh, RANKED, RANKED, virtual=virtual)

    restored = lifted(quantize=True, restore=True)
    y = jax.block_until_ready(jax.jit(restored)(x, slots, weights))
    want = _expected(x, slots, weights, 2)
    step = np.abs(x).max(-1, keepdims=True) / 127
    worst = (np.abs(weights)[..., None] * (slots + 1.0)[..., None] * step[:, :, None] / 2).sum(2)
    assert (np.abs(y - want) <= worst * 1.001 + 1e-4).all()
    assert np.abs(y - want).max() > 1e-3

    def gradient(fn):
        return jax.block_until_ready(
            jax.jit(jax.grad(lambda x: fn(x, slots, weights).sum()))(jnp.asarray(x))
        )

    np.testing.assert_allclose(gradient(restored), gradient(lifted()), rtol=1e-6)


def test_a_full_block_keeps_the_highest_priorities_and_then_the_earliest():
    x = jnp.arange(6.0)[:, None] * jnp.ones(4)
    slots = jnp.zeros((6, 1), jnp.int32)
    priority = jnp.array([0.1, 0.9, 0.5, 0.9, 0.2, 0.5])[:, None]
    sent = dispatch(x, slots, capacity=4, priority=priority, **ALONE)
    np.testing.assert_array_equal(sent.rows[0, :, 0], [1, 3, 2, 5])
    np.testing.assert_array_equal(sent.position[:, 0], [5, 0, 2, 1, 4, 3])
    assert int(sent.dropped) == 2
    in_order = dispatch(x, slots, capacity=4, **ALONE)
    np.testing.assert_array_equal(in_order.rows[0, :, 0], [0, 1, 2, 3])


def _alone(x, slots, weights):
    sent = dispatch(x, slots, quantize=True, restore=True, **ALONE)
    return combine(sent.rows, slots, sent.position, weights, **ALONE)


TRANSFORMS = {
    "jit": jax.jit,
    "vmap": lambda f: lambda *a: jax.vmap(f)(*(jnp.stack([i, i]) for i in a))[1],
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda *a: jax.lax.scan(lambda c, _: (c, f(*a)), 0, None, length=2)[1][1],
    "export": lambda f: (
        lambda *a: export.deserialize(export.export(jax.jit(f))(*a).serialize()).call(*a)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_values_are_the_same_under_every_transformation(transform):
    x, _, weights = (jnp.asarray(a[0]) for a in _case(1, 5))
    slots = jnp.asarray(np.argsort(np.random.default_rng(1).random((6, 5)), axis=1)[:, :3])
    np.testing.assert_allclose(
        TRANSFORMS[transform](_alone)(x, slots, weights),
        _alone(x, slots, weights),
        atol=1e-6,
    )


def test_gradients_go_through_jit_of_vmap_of_grad():
    x, _, weights = (jnp.asarray(a[0]) for a in _case(1, 5))
    slots = jnp.asarray(np.argsort(np.random.default_rng(1).random((6, 5)), axis=1)[:, :3])
    gradient = jax.grad(lambda x, s, w: _alone(x, s, w).sum())
    got = jax.jit(jax.vmap(gradient))(x[None], slots[None], weights[None])[0]
    want = jnp.broadcast_to(weights.sum(1, keepdims=True), x.shape)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_row_of_zeros_quantizes_to_zeros():
    steps, scale = quantize_rows(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(steps, 0)
    assert bool((scale > 0).all())


def test_sizes_and_capacity_may_be_symbolic():
    tokens, capacity = export.symbolic_shape("t, c")
    x = jax.ShapeDtypeStruct((tokens, 8), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((tokens, 2), jnp.int32)
    weights = jax.ShapeDtypeStruct((tokens, 2), jnp.float32)
    how = ALONE | {"capacity": capacity}

    def fn(x, slots, weights):
        sent = dispatch(x, slots, quantize=True, **how)
        rows = sent.rows.astype(jnp.bfloat16)
        return sent, combine(rows, slots, sent.position, weights, **how)

    jaxpr = jax.make_jaxpr(fn)(x, slots, weights)
    sent, y = jax.eval_shape(fn, x, slots, weights)
    assert sent.rows.shape == (5, capacity, 8)
    assert y.shape == (tokens, 8)
    found = {eqn.primitive.name: eqn.params for eqn in jaxpr.eqns}
    assert found["cm_dispatch"]["capacity"] == capacity
    assert set(found["cm_combine"]) == {"axes", "ranks", "slots_per_rank", "capacity"}


def _combined(**changes):
    arguments = {
        "rows": jnp.ones((5, 6, 4)),
        "slots": jnp.zeros((6, 2), jnp.int32),
        "position": jnp.zeros((6, 2), jnp.int32),
        "weights": jnp.ones((6, 2)),
    } | changes
    return combine(**arguments, **ALONE)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: dispatch(jnp.ones((3, 4), int), jnp.zeros((3, 2), int), **ALONE),
            r"x must be floating point \[tokens, hidden\], got int",
        ),
        (
            lambda: dispatch(jnp.ones((3, 4)), jnp.zeros((2, 2), int), **ALONE),
            r"slots must be \[tokens, copies\] with 3 tokens, got \(2, 2\)",
        ),
        (
            lambda: dispatch(jnp.ones((3, 4)), jnp.zeros((3, 2), int), capacity=0, **ALONE),
            "capacity must be at least 1 row, or None, got 0",
        ),
        (
            lambda: dispatch(
                jnp.ones((3, 4)), jnp.zeros((3, 2), int), priority=jnp.ones((3, 1)), **ALONE
            ),
            r"slots and priority must both be \[tokens, copies\], got \(3, 2\) and \(3, 1\)",
        ),
        (
            lambda: dispatch(jnp.ones((3, 4)), jnp.zeros((3, 2), int), restore=True, **ALONE),
            "restore=True turns INT8 rows back into floats; it needs quantize=True",
        ),
        (
            lambda: dispatch(
                jnp.ones((3, 4)), jnp.zeros((3, 2), int), axes=(), ranks=8, slots_per_rank=1
            ),
            "8 ranks need the mesh axes",
        ),
        (
            lambda: _combined(weights=jnp.ones((6, 3))),
            r"slots and weights must both be \[tokens, copies\], got \(6, 2\) and \(6, 3\)",
        ),
        (lambda: _combined(rows=jnp.ones((5, 7, 4))), r"\[5, 6, hidden\], got \(5, 7, 4\)"),
    ],
)
def test_bad_inputs_are_refused_with_what_would_do(build, message):
    with pytest.raises(ValueError, match=message):
        build()
