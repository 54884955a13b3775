"""Gradients, batches and depth of a priced model step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.cost import price
from cmjax.deploy.deployment import Deployment
from cmjax.deploy.moe_step import build_step
from cmjax.hardware import load_machine

MACHINES = ("cloudmatrix384", "h800-pod")
SIZES = {"batch": 768.0, "context": 3000.0, "load": 1.3}


@pytest.fixture(scope="module")
def decode():
    """The decode step of a tiny DeepSeek with two microbatches, and on one machine with MTP."""
    found = {}
    for name in MACHINES:
        machine = load_machine(name)
        mtp = name == "cloudmatrix384"
        step = build_step(
            Deployment(phase="decode", model="tiny", npus=8, mtp=mtp, microbatches=2), machine
        )
        found[name] = step, step.trace(), machine
    return found


def total_s(step, program):
    @jax.jit
    def total(machine, sizes):
        return price(program, machine, step.symbols(sizes)).total_s

    return total


def moved(tree, index, factor):
    leaves, structure = jax.tree.flatten(tree)
    leaves[index] = leaves[index] * factor
    return jax.tree.unflatten(structure, leaves)


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
def test_gradients_are_central_differences_in_every_constant_size_and_load(decode, name):
    step, program, machine = decode[name]
    h = 1e-5
    with jax.enable_x64(True):
        total = total_s(step, program)
        # Every constant a little off its round value, so that no two maxima tie; a constant that
        # is zero in the catalog (and so has no relative step) is given one.
        rng = np.random.default_rng(0)
        machine = jax.tree.map(lambda x: float((x or 1e-8) * rng.uniform(0.9, 0.99)), machine)
        point = machine, SIZES
        at = float(total(*point))
        gradient = jax.jit(jax.grad(total, argnums=(0, 1)))(*point)
        leaves = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(point)]
        values, slopes = jax.tree.leaves(point), map(float, jax.tree.leaves(gradient))
        for i, (leaf, value, slope) in enumerate(zip(leaves, values, slopes, strict=True)):
            up, down = (float(total(*moved(point, i, 1 + s * h))) for s in (1, -1))
            elasticity, quotient = slope * value / at, (up - down) / (2 * h) / at
            # The difference of two totals, each rounded in hundreds of additions.
            noise = 100 * np.finfo(float).eps / h
            assert quotient == pytest.approx(elasticity, rel=1e-4, abs=noise), leaf
            # Rates save time; delays, work and disturbance cost it.
            delay = leaf.endswith("_s") and "_per_s" not in leaf
            costs = delay or any(
                x in leaf for x in (*SIZES, "saturation", "interference", "exposed", "factors")
            )
            assert slope >= 0 if costs else slope <= 0, leaf
    assert len(leaves) == len(jax.tree.leaves(machine)) + len(SIZES)


def test_a_thousand_configurations_at_once_equal_one_by_one(decode):
    step, program, machine = decode["cloudmatrix384"]
    count = 1000
    rng = np.random.default_rng(1)
    sizes = {
        "batch": rng.uniform(8, 2000, count),
        "context": rng.uniform(64, 9000, count),
        "load": rng.uniform(1, 3, count),
    }
    machines = jax.tree.map(lambda x: x * rng.uniform(0.5, 1.0, count), machine)
    with jax.enable_x64(True):
        sizes, machines = jax.tree.map(jnp.asarray, (sizes, machines))
        total = total_s(step, program)
        batched = jax.jit(jax.vmap(total))(machines, sizes)
        assert batched.shape == (count,)
        in_turn = jax.jit(lambda xs: jax.lax.map(lambda x: total(*x), xs))((machines, sizes))
        np.testing.assert_allclose(batched, in_turn, rtol=1e-12)
        for i in range(0, count, 20):
            one = jax.tree.map(lambda x, i=i: x[i], (machines, sizes))
            assert float(total(*one)) == pytest.approx(float(batched[i]), rel=1e-12)
    assert len(np.unique(batched)) == count


def test_the_steps_schedule_is_an_event_replay(decode):
    step, program, machine = decode["cloudmatrix384"]
    with jax.enable_x64(True):
        timeline = jax.jit(lambda m: price(program, m, step.symbols(SIZES)))(machine)
    end = max(e.start_s + e.duration_s for e in timeline.events())
    assert end == pytest.approx(float(timeline.total_s), rel=1e-10)


def test_a_smooth_price_of_the_step_bounds_it_from_above(decode):
    step, program, machine = decode["cloudmatrix384"]
    with jax.enable_x64(True):
        sizes = step.symbols(SIZES)
        exact, coarse, fine = (
            float(jax.jit(lambda t=t: price(program, machine, sizes, temperature=t).total_s)())
            for t in (0.0, 1e-8, 1e-11)
        )
    assert exact * (1 - 1e-12) < fine < coarse
    assert fine < exact * (1 + 1e-4)


def test_a_load_per_layer_is_differentiable_layer_by_layer(decode):
    step, program, machine = decode["cloudmatrix384"]
    layers = step.layers
    load = np.linspace(1.1, 2.0, layers)

    with jax.enable_x64(True):

        @jax.jit
        def total(load):
            return price(program, machine, step.symbols(SIZES | {"load": load})).total_s

        slopes = np.asarray(jax.jit(jax.grad(total))(jnp.asarray(load)))
        for i in range(layers):
            h = 1e-5 * np.eye(layers)[i]
            quotient = float(total(load + h) - total(load - h)) / 2e-5
            assert slopes[i] == pytest.approx(quotient, rel=1e-4)
    assert (slopes > 0).all()
