"""Machines as pytrees."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from cmjax.hardware import catalog, leaf_names, load_machine, replace_leaf


def _floats(tree, prefix=""):
    """Dotted names of every float field, from the dataclasses themselves."""
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if dataclasses.is_dataclass(value):
            yield from _floats(value, f"{prefix}{field.name}.")
        elif isinstance(value, tuple) and not field.metadata.get("static"):
            for part in value:
                yield from _floats(part, f"{prefix}{field.name}.{part.name}.")
        elif isinstance(value, float):
            yield f"{prefix}{field.name}", value


@pytest.mark.parametrize("name", catalog())
def test_the_leaves_are_exactly_the_floats(name):
    machine = load_machine(name)
    leaves = {
        name: leaf for name, leaf in zip(leaf_names(machine), jax.tree.leaves(machine), strict=True)
    }
    assert leaves == dict(_floats(machine))


def test_flattening_and_rebuilding_gives_the_same_machine():
    machine = load_machine("cloudmatrix384")
    leaves, structure = jax.tree.flatten(machine)
    assert jax.tree.unflatten(structure, leaves) == machine
    assert jax.tree.structure(load_machine("h800-pod")) != structure  # counts and names are static


def test_the_gradient_with_respect_to_a_machine_is_a_machine():
    machine = load_machine("cloudmatrix384")

    def seconds(machine):
        tier = machine.fabric.node
        return tier.latency_s + 1e6 / tier.bandwidth_bytes_per_s + 0.0 * machine.nodes

    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(seconds))(machine)
    assert gradient.name == machine.name and gradient.ranks == machine.ranks
    want = -1e6 / machine.fabric.node.bandwidth_bytes_per_s**2
    assert float(gradient.fabric.node.latency_s) == 1.0
    assert float(gradient.fabric.node.bandwidth_bytes_per_s) == pytest.approx(want, rel=1e-12)
    others = [leaf for leaf in jax.tree.leaves(gradient) if float(leaf) != 0]
    assert len(others) == 2


def test_machines_can_be_batched():
    machine = load_machine("cloudmatrix384")
    rates = jnp.array([1e12, 2e12])
    many = jax.vmap(lambda r: replace_leaf(machine, "chip.hbm_bytes_per_s", r))(rates)
    assert many.chip.hbm_bytes_per_s.tolist() == rates.tolist()
    assert many.chip.hbm_bytes.shape == (2,)
    assert many.ranks == 768


def test_replacing_a_leaf_changes_nothing_else():
    machine = load_machine("cloudmatrix384")
    changed = replace_leaf(machine, "fabric.node.latency_s", 3.0)
    before, after = dict(_floats(machine)), dict(_floats(changed))
    assert after == before | {"fabric.node.latency_s": 3.0}
    assert replace_leaf(machine, "nodes", 2).ranks == 32
    assert machine == load_machine("cloudmatrix384")


@pytest.mark.parametrize(
    "key, message",
    [
        ("ship.hbm_bytes", "Supernode has no 'ship'; it has chip, fabric, exchange, efficiency"),
        ("chip.hbm", "Chip has no 'hbm'; it has cube_flops_8bit, cube_flops_16bit"),
        ("fabric.node.speed", "Tier has no 'speed'; it has bandwidth_bytes_per_s, latency_s"),
    ],
)
def test_replacing_what_is_not_there_lists_what_is(key, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        replace_leaf(load_machine("cloudmatrix384"), key, 1.0)
