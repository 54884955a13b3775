"""Presets have the parameters that their models are published with."""

import dataclasses

import jax
import numpy as np
import pytest

from cmjax.models.moe.parallelism import one_rank
from cmjax.models.moe.presets import PRESETS
from cmjax.models.moe.steps import abstract_params

BILLIONS = {  # of the model cards; without a draft module
    "deepseek-r1": 671,
    "deepseek-v3": 671,
    "kimi-k2": 1026,
    "llama3-70b": 70.6,
    "llama3-8b": 8.03,
    "qwen3-235b-a22b": 235.1,
    "qwen3-30b-a3b": 30.5,
    "qwen3-32b": 32.8,
    "qwen3-8b": 8.2,
}


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"tiny"}))
def test_a_preset_has_the_published_number_of_parameters(name):
    config = dataclasses.replace(PRESETS[name](), mtp_layers=0)
    parameters = abstract_params(config, one_rank(config), "bfloat16")
    count = sum(np.prod(x.shape, dtype=float) for x in jax.tree.leaves(parameters))
    assert count / 1e9 == pytest.approx(BILLIONS[name], rel=2e-3)
