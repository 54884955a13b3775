"""A step's sensitivity to the machine: the gradient is the central difference."""

import jax
import pytest

from cmjax.hardware import leaf_names, load_machine
from cmjax.models.dense import DenseConfig
from cmjax.parallelism import Prices, elasticities, parse_plan

MODEL = DenseConfig(layers=8, hidden=1024, heads=8, ffn=4096, vocab=4096, sequence=512)
PLANS = [
    "data=16,tensor=4,pipeline=4,optimizer=zero1",
    "data=16,tensor=4,pipeline=4,schedule=zero_bubble,recompute=none,overlap=true",
]


def _scaled(machine, name: str, factor: float):
    """The machine with one constant changed."""
    leaves, tree = jax.tree.flatten(machine)
    names = leaf_names(machine)
    return jax.tree.unflatten(
        tree, [x * factor if n == name else x for n, x in zip(names, leaves, strict=True)]
    )


@pytest.mark.parametrize("plan", PLANS)
def test_the_gradient_is_the_central_difference(plan):
    machine, parsed = load_machine("ascend910-2048"), parse_plan(plan)
    found = elasticities(MODEL, machine, parsed, 128)
    assert list(found.values()) == sorted(found.values(), key=lambda e: -abs(e))

    def step_s(machine) -> float:
        return Prices(MODEL, machine, (1,)).step(parsed, 128).step_s

    for name in (
        "chip.cube_flops_16bit",
        "fabric.die.bandwidth_bytes_per_s",
        "fabric.node.bandwidth_bytes_per_s",
        "chip.collective_startup_s",
    ):
        more, less = (step_s(_scaled(machine, name, 1 + h)) for h in (0.02, -0.02))
        slope = (more - less) / 0.04 / step_s(machine)
        assert found[name] == pytest.approx(slope, rel=0.02, abs=1e-4)
