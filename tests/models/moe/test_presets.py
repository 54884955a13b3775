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
GLM = {"glm-4.5-air": 110, "glm-4.7": 358}  # of the published files: the draft module is in them


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"tiny"} - GLM.keys()))
def test_a_preset_has_the_published_number_of_parameters(name):
    config = dataclasses.replace(PRESETS[name](), mtp_layers=0)
    assert _count(config) / 1e9 == pytest.approx(BILLIONS[name], rel=2e-3)


@pytest.mark.parametrize("name", GLM)
def test_the_files_of_a_glm_hold_its_draft_module_and_that_ones_embedding_and_head(name):
    config = PRESETS[name]()
    count = _count(config, mtp=True) + 2 * config.vocab_size * config.hidden_size
    assert count / 1e9 == pytest.approx(GLM[name], abs=0.5)


def test_the_355_billion_of_glm_are_with_the_draft_module_and_without_embedding_and_head():
    config = PRESETS["glm-4.7"]()
    count = _count(config, mtp=True) - 2 * config.vocab_size * config.hidden_size
    assert count / 1e9 == pytest.approx(355, rel=2e-3)


def _count(config, **options):
    parameters = abstract_params(config, one_rank(config), "bfloat16", **options)
    return sum(np.prod(x.shape, dtype=float) for x in jax.tree.leaves(parameters))
