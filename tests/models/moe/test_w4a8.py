"""Experts in four bits: as the float model nearly, on a mesh exactly, and half as large."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cmjax
from cmjax.mesh import RANKED, RankMesh, on_every_rank
from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.layers import moe, norm
from cmjax.models.moe.model import from_config
from cmjax.models.moe.model import parameters as parameters_of
from cmjax.models.moe.parallelism import Parallelism, one_rank
from cmjax.models.moe.presets import deepseek_v3, tiny
from cmjax.models.moe.sharding import param_specs, shard_params
from cmjax.models.moe.slots import ep_table
from cmjax.models.moe.steps import PrefillInputs, Sampling, abstract_params, prefill_fn

CONFIG = tiny()


def _prompts():
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (8, 5)).astype(np.int32)
    ones = jnp.ones((8,))
    return PrefillInputs(
        jnp.asarray(tokens), jnp.full((8,), 5, jnp.int32), Sampling(0 * ones, 0 * ones, ones)
    )


def test_logits_stay_close_to_the_float_model():
    model = from_config(CONFIG)
    rounded = model.with_arithmetic("w4a8")
    held = parameters_of(rounded)["main"]["moe"]["layers"]["moe"]["experts"]["gate_up"]
    assert held["weight"].dtype == jnp.uint8 and held["weight"].shape == (2, 16, 32, 64)
    tokens = _prompts().tokens
    a, b = (
        np.asarray(m(tokens), np.float64).reshape(-1, CONFIG.vocab_size) for m in (model, rounded)
    )
    alike = [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]
    assert np.median(alike) > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("sorts", [False, True])
def test_a_mesh_gives_the_logits_of_one_rank(monkeypatch, sorts):
    # of few rows a CPU rounds norms to bfloat16 in a kernel of its own: a rank here has few, the
    # whole batch has not
    monkeypatch.setattr(norm, "is_few", lambda *_: False)
    monkeypatch.setattr(moe, "is_routed_at_once", lambda *_: False)
    prompts = _prompts()
    params = parameters_of(from_config(CONFIG).with_arithmetic("w4a8"))
    alone = dataclasses.replace(one_rank(CONFIG), sort_rows=sorts)
    run = jax.jit(prefill_fn(CONFIG, alone, "w4a8", "float32"))
    want = run({"main": params["main"]}, prompts).logits
    mesh = RankMesh(2, 2, 2)
    parallelism = Parallelism(table=ep_table(16, 8, redundant=8), axes=mesh.axes)
    split = shard_params({"main": params["main"]}, parallelism)
    fn = prefill_fn(CONFIG, parallelism, "w4a8", "float32")
    lifted = on_every_rank(fn, mesh, (param_specs(split, parallelism), RANKED), RANKED)
    ranked = jax.tree.map(lambda x: x.reshape(8, 1, *x.shape[1:]), prompts)
    got = jax.block_until_ready(jax.jit(lifted)(split, ranked)).logits
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-5)


def test_experts_take_half_the_bytes_of_eight_bits():
    config = deepseek_v3()

    def held(precision):
        shapes = abstract_params(config, one_rank(config), precision)
        experts = shapes["main"]["moe"]["layers"]["moe"]["experts"]
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(experts))

    values = 58 * 256 * 3 * config.hidden_size * config.expert_ffn_size
    assert held("int8") == pytest.approx(values, rel=2e-3)
    scales = 4 / 256
    assert held("w4a8") == pytest.approx(values * (0.5 + scales), rel=1e-6)


def test_a_step_of_few_rows_saves_the_time_of_reading_the_other_half():
    machine = cmjax.load_machine("cloudmatrix384")
    options = {"phase": "decode", "npus": 16, "batch": 8, "context": 2048, "microbatches": 1}

    def step_s(quant):
        found = cmjax.predict("deepseek-r1", machine, quant=quant, **options)
        return float(found.step_s) - float(sum(found.waiting_s.values()))

    config = deepseek_v3()
    experts = 256 // 32  # of a die; eight rows each, so that next to none goes unread
    read = 59 * experts * 3 * config.hidden_size * config.expert_ffn_size  # the draft's layer too
    rate = float(machine.chip.hbm_bytes_per_s * machine.efficiency.hbm)
    saved = read * (0.5 - 4 / 256) / rate
    assert step_s("int8") - step_s("w4a8") == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Arithmetic(**{"dense": "w4a8"}), "dense must be one of .*, got 'w4a8'"),
        (
            lambda: from_config(dataclasses.replace(CONFIG, expert_ffn_size=258), precision="w4a8"),
            "inner dimension must be a multiple of 256, or even and below, got 258",
        ),
    ],
)
def test_what_four_bits_do_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
