"""A small priced program with two streams and two microbatches, and a result made from it."""

import jax
import jax.numpy as jnp
import pytest

from cmjax.cost import price
from cmjax.hardware import load_machine
from cmjax.program import trace
from cmjax.program.mark import stream

LAYERS = 5
HOST_MS = 0.5


def _layer(states, weight):
    done = []
    for x in states:
        with stream("attention", cube=16, vector=32), jax.named_scope("attention"):
            with jax.named_scope("core"):
                x = x @ weight
            x = x @ weight
        with stream("moe", cube=8, vector=16), jax.named_scope("experts"):
            x = x @ weight
        done.append(x)
    return tuple(done), None


def _step(first, second, weights):
    with jax.named_scope("embed"):
        first, second = first + 1, second + 1
    (first, second), _ = jax.lax.scan(_layer, (first, second), weights)
    with jax.named_scope("lm_head"):
        return first @ weights[0], second @ weights[0]


@pytest.fixture(scope="session")
def timeline():
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((LAYERS, 4096, 4096), jnp.bfloat16)
    return price(trace(_step, x, x, weights), load_machine("cloudmatrix384"), {})


@pytest.fixture
def result(timeline):
    step_ms = float(timeline.total_s) * 1e3 + HOST_MS
    return {
        "step_ms": step_ms,
        "tpot_ms": step_ms / 1.7,
        "tokens_per_s_per_npu": 2061.4,
        "per_layer_us": 812.0,
        "breakdown": {k or "other": float(v) * 1e3 for k, v in timeline.scopes.items()},
        "engines_busy_ms": {"cube": step_ms / 2, "hbm": step_ms / 4},
        "hbm_gb_per_die": {"weights": 20.7, "caches": 14.9},
        "fits_hbm": True,
        "machine": "cloudmatrix384",
        "deployment": {"phase": "decode", "model": "deepseek-r1", "npus": 160},
        "requests": {"batch": 96.0, "prompt": 4096.0},
    }
