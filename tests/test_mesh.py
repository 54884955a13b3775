"""The emulated supernode: rank order, specs, size limits, and round trips at full size."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.mesh import RANKED, REPLICATED, RankMesh, on_every_rank, prepare_devices

MESHES = [RankMesh(2, 4), RankMesh(2, 2, 2), RankMesh(8, 1), RankMesh(1, 2, 4)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("virtual", [True, False])
def test_rank_order_is_node_npu_die_row_major(mesh, virtual):
    def fn(x):
        return jax.lax.axis_index(mesh.axes), x

    lifted = on_every_rank(fn, mesh, RANKED, RANKED, virtual=virtual)
    index, x = jax.jit(lifted)(jnp.arange(8.0))
    np.testing.assert_array_equal(index, np.arange(8))
    np.testing.assert_array_equal(x, np.arange(8.0))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_specs_are_prefixes_of_nested_arguments_and_results(mesh):
    def fn(params, x):
        y = x * params["scale"] + params["each"]["offset"]
        return {"y": y, "total": jax.lax.psum(y, mesh.axes)}

    lifted = on_every_rank(
        fn,
        mesh,
        ({"scale": REPLICATED, "each": RANKED}, RANKED),
        {"y": RANKED, "total": REPLICATED},
    )
    x = np.arange(24.0).reshape(8, 3)
    offset = np.arange(8.0)[:, None]
    out = jax.jit(lifted)({"scale": jnp.full(3, 2.0), "each": {"offset": offset}}, x)
    np.testing.assert_array_equal(out["y"], 2 * x + offset)
    np.testing.assert_array_equal(out["total"], (2 * x + offset).sum(0))


def test_replicated_results_come_back_without_a_rank_axis():
    mesh = RankMesh(2, 4)
    total = on_every_rank(lambda x: jax.lax.psum(x, mesh.axes), mesh, RANKED, REPLICATED)
    assert float(jax.jit(total)(jnp.arange(8.0))) == 28


def test_a_plain_mesh_rejects_a_result_that_is_not_replicated():
    mesh = RankMesh(2, 4)
    lifted = on_every_rank(lambda x: x, mesh, RANKED, REPLICATED, virtual=False)
    with pytest.raises(ValueError, match="replicated"):
        jax.jit(lifted)(jnp.arange(8.0))


def test_an_abstract_mesh_of_any_size_traces_without_devices():
    mesh = RankMesh(48, 8, 2)
    fn = on_every_rank(
        lambda x: jax.lax.psum(x, mesh.axes), mesh, RANKED, REPLICATED, abstract=True
    )
    jaxpr = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct((768, 5), jnp.float32))
    assert jaxpr.out_avals[0].shape == (5,)
    assert mesh.abstract().shape == {"node": 48, "npu": 8, "die": 2}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RankMesh(0), "nodes must be an integer of at least 1, got 0"),
        (lambda: RankMesh(2, 8, 0), "dies must be an integer of at least 1, got 0"),
        (
            lambda: RankMesh(16).concrete(),
            r"needs 16 XLA devices, this process has 8; call .*\(16\)",
        ),
        (lambda: RankMesh(48, 8).plain(), "deadlock above 256 devices"),
        (lambda: prepare_devices(257), "got 257: XLA's CPU collectives can deadlock above 256"),
        (lambda: prepare_devices(0), "1 to 256, got 0"),
        (
            lambda: on_every_rank(lambda x: x, RankMesh(2, 4), RANKED, RANKED)(jnp.ones(7)),
            r"leading axis of 8 ranks, got shape \(7,\)",
        ),
        (
            lambda: on_every_rank(lambda x: x, RankMesh(2, 4), "ranked", RANKED)(jnp.ones(8)),
            "must be RANKED or REPLICATED, got 'ranked'",
        ),
    ],
)
def test_bad_inputs_are_refused_with_what_would_do(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_preparing_too_late_says_how_to_fix_it(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # restored afterwards
    with pytest.raises(RuntimeError, match=r"runs with 8 device.*64 are needed.*before the first"):
        prepare_devices(64)
    prepare_devices(8)


ROUND_TRIP = """
import sys
import numpy as np
import jax
from cmjax.mesh import RANKED, RankMesh, on_every_rank, prepare_devices
mesh = RankMesh(*map(int, sys.argv[1:]))
prepare_devices(mesh.nodes)
assert len(jax.devices()) == mesh.nodes
from cmjax.primitives.exchange import combine, dispatch
ranks, tokens, hidden, copies, held = mesh.ranks, 3, 4, 2, 2
rng = np.random.default_rng(0)
x = rng.normal(size=(ranks, tokens, hidden)).astype(np.float32)
slots = rng.integers(0, ranks * held, size=(ranks, tokens, copies)).astype(np.int32)
weights = rng.normal(size=(ranks, tokens, copies)).astype(np.float32)
how = dict(axes=mesh.axes, ranks=ranks, slots_per_rank=held, capacity=2)

def fn(x, slots, weights):
    sent = dispatch(x, slots, **how)
    factor = jax.lax.axis_index(mesh.axes) * held + jax.numpy.arange(held) + 1.0
    rows = sent.rows * factor[:, None, None]
    return combine(rows, slots, sent.position, weights, **how), sent.position, sent.dropped

step = jax.jit(on_every_rank(fn, mesh, RANKED, RANKED))
for _ in range(2):
    y, position, dropped = jax.block_until_ready(step(x, slots, weights))
kept = weights * (np.asarray(position) < 2)
want = (x[:, :, None] * (slots + 1.0)[..., None] * kept[..., None]).sum(2)
assert int(dropped.sum()) == int((np.asarray(position) >= 2).sum())
np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-3)
print("round trip over", ranks)
"""


@pytest.mark.parametrize("shape", [(2, 4), (8, 8), (48, 8), (48, 8, 2)], ids=str)
def test_dispatch_and_combine_make_a_round_trip(shape):
    # A stuck collective aborts its process, so each size has one of its own.
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", ROUND_TRIP, *map(str, shape)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"round trip over {np.prod(shape)}" in done.stdout


def test_a_text_names_a_mesh_of_nodes_by_npus_by_dies():
    assert RankMesh.parse("48x8") == RankMesh(48, 8)
    assert RankMesh.parse("2x3x2") == RankMesh(2, 3, 2)
    assert RankMesh.parse("8") == RankMesh(1, 8)
    with pytest.raises(ValueError, match=r"mesh must be NODESxNPUS .* got .8\*8"):
        RankMesh.parse("8*8")
