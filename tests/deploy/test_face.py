"""`cmjax.predict` in one call: values, plans, and JAX's transformations through it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cmjax
from cmjax.cost import price
from cmjax.cost.load import imbalance
from cmjax.deploy import Deployment, Predictor, Requests, build_step, predictor_of
from cmjax.placement import Loads, Plan, Problem, contiguous, greedy, with_shared, write_plan

M = cmjax.load_machine("cloudmatrix384")
TINY = {"npus": 4, "mtp": False}
RANKS, EXPERTS, LAYERS = 8, 16, 2


def tiny(**options):
    return cmjax.predict("tiny", M, **{"phase": "decode", "batch": 96, **TINY, **options})


@pytest.fixture(scope="module")
def loads():
    counts = np.random.default_rng(0).gamma(0.5, size=(3, LAYERS, EXPERTS)) + 0.01
    return Loads(counts)


def test_a_prediction_is_the_predictors_of_the_faster_number_of_microbatches():
    found = tiny(context=2048)
    both = [tiny(context=2048, microbatches=count) for count in (1, 2)]
    best = max(both, key=lambda p: float(p.tokens_per_s_per_npu))
    assert float(found.tpot_s) == float(best.tpot_s)
    assert int(found.microbatches) == int(best.microbatches)
    deployment = Deployment(phase="decode", model="tiny", microbatches=1, **TINY)
    alone = Predictor.of(deployment, M).predict(Requests(batch=96, context=2048))
    assert float(alone.step_s) == float(both[0].step_s)


def test_cached_tokens_are_prompt_and_half_the_output():
    assert float(tiny(context=4224).step_s) == float(
        tiny(prompt=4096, output=256, context_spread=0.0).step_s
    )


def test_defaults_are_those_of_the_phase():
    decode, prefill = (
        cmjax.predict("tiny", phase=phase, npus=4) for phase in ("decode", "prefill")
    )
    assert decode.requests.batch == 96 and prefill.requests.batch == 4
    assert (Deployment(phase="decode").npus, Deployment(phase="prefill").npus) == (160, 16)


def test_latency_is_named_after_the_phase():
    decode, prefill = tiny(), cmjax.predict("tiny", M, phase="prefill", npus=4)
    assert "tpot_ms" in decode.to_dict() and "ttft_ms" in prefill.to_dict()
    with pytest.raises(AttributeError, match="prefill has no tpot_s"):
        _ = prefill.tpot_s
    with pytest.raises(AttributeError, match="decode has no ttft_s"):
        _ = decode.ttft_s


def test_drafts_count_only_where_the_model_makes_them():
    config = {"npus": 4, "batch": 96, "acceptance": 0.7}
    with_drafts = cmjax.predict("tiny", M, phase="decode", **config)
    without = cmjax.predict("tiny", M, phase="decode", mtp=False, **config)
    assert with_drafts.tokens_per_step == pytest.approx(1.7)
    assert without.tokens_per_step == 1
    assert float(without.tpot_s) == float(without.step_s)


def test_the_gradient_is_the_central_difference_in_a_constant():
    def tpot_s(bandwidth):
        chip = dataclasses.replace(M.chip, hbm_bytes_per_s=bandwidth)
        machine = dataclasses.replace(M, chip=chip)
        return cmjax.predict("tiny", machine, phase="decode", batch=96, **TINY).tpot_s

    with jax.enable_x64(True):
        at = float(M.chip.hbm_bytes_per_s)
        step = 1e-4 * at
        central = (tpot_s(at + step) - tpot_s(at - step)) / (2 * step)
        assert jax.grad(tpot_s)(at) == pytest.approx(float(central), rel=1e-4)


def test_batches_at_once_are_batches_one_by_one():
    batches = jnp.array([8.0, 96.0, 400.0])
    found = jax.vmap(lambda batch: tiny(batch=batch))(batches)
    assert found.tpot_s.shape == (3,) and "batched" in repr(found)
    for i, batch in enumerate(batches):
        alone = tiny(batch=float(batch))
        assert float(found.tpot_s[i]) == pytest.approx(float(alone.tpot_s), rel=1e-5)
        assert int(found.microbatches[i]) == int(alone.microbatches)
    with pytest.raises(ValueError, match="traced or batched"):
        found.to_dict()


def test_a_prediction_passes_through_jit():
    found = jax.jit(lambda batch: tiny(batch=batch))(96.0)
    assert float(found.step_s) == pytest.approx(float(tiny().step_s), rel=1e-6)
    assert found.deployment == tiny().deployment


def test_a_plan_sets_the_slowest_rank_of_the_whole_step(loads):
    plans = {rule: rule(Problem(loads, RANKS, 8)) for rule in (contiguous, greedy)}
    found = {rule: tiny(plan=plan, loads=loads) for rule, plan in plans.items()}
    for rule, plan in plans.items():
        expected = imbalance(plan.tokens_per_rank(loads.counts.mean(0)))
        np.testing.assert_allclose(found[rule].requests.load, expected)
    assert found[greedy].step_s < found[contiguous].step_s
    even = Loads(np.ones((LAYERS, EXPERTS)))
    one_each = contiguous(Problem(even, RANKS, 0))
    step_s = tiny(plan=one_each, loads=even).step_s
    assert step_s == pytest.approx(float(tiny(load=1.0, plan=one_each, loads=even).step_s))


def test_a_plan_in_a_file_and_counts_in_an_array_are_read(loads, tmp_path):
    plan = greedy(Problem(loads, RANKS, 8))
    write_plan(tmp_path / "plan.json", plan)
    np.save(tmp_path / "loads.npy", loads.counts)
    by_path = tiny(plan=tmp_path / "plan.json", loads=tmp_path / "loads.npy")
    by_value = tiny(plan=plan, loads=loads.counts)
    assert float(by_path.step_s) == float(by_value.step_s)


def test_a_prefill_takes_a_plan_too(loads):
    plan = greedy(Problem(loads, RANKS, 8))
    found = tiny(phase="prefill", batch=4, plan=plan, loads=loads)
    assert found.ttft_s > 0
    np.testing.assert_allclose(
        found.requests.load, imbalance(plan.tokens_per_rank(loads.counts.mean(0)))
    )


def test_shared_experts_in_slots_are_part_of_the_plan(loads):
    both = with_shared(loads, 1, 4)
    plan = greedy(Problem(both, RANKS, 7))
    found = tiny(plan=plan, loads=loads)
    expected = imbalance(plan.tokens_per_rank(with_shared(loads, 1, 4).counts.mean(0)))
    np.testing.assert_allclose(found.requests.load, expected)


def test_the_timeline_of_a_prediction_takes_as_long():
    found = tiny()
    timeline = predictor_of(found).timeline(found.requests)
    assert float(timeline.total_s + M.running().step_s) == pytest.approx(float(found.step_s))


def test_it_is_shown_in_one_line_and_as_a_table():
    found = tiny()
    assert re.fullmatch(
        r"Prediction\(decode of tiny on cloudmatrix384: TPOT .* per die\)", repr(found)
    )
    assert found._repr_html_().count("<table>") == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"npu": 4}, "predict: unknown option 'npu'; it takes npus"),
        ({"batch": -1}, "batch must be positive, got -1"),
        ({"batch": float("inf")}, "batch must be a finite number, got inf"),
        ({"context": 0}, "context must be positive, got 0"),
        ({"phase": "prefill", "batch": 4, "context": 8}, "context applies to decode; give prompt"),
        ({"phase": "prefill", "slo_tpot_ms": 30.0}, "slo-tpot-ms applies to decode"),
        ({"plan": Plan(np.arange(16)[None], 16, 8)}, "plan needs loads"),
        ({"loads": np.ones((3, 16))}, "load loads: 3 layers x 16 experts; the model has 2 MoE"),
        (
            {"plan": Plan(np.arange(16)[None].repeat(2, 0), 16, 4), "loads": np.ones((2, 16))},
            "plan: a plan for 4 ranks; the deployment has 8",
        ),
        (
            {"plan": Plan(np.arange(24)[None].repeat(2, 0), 24, 8), "loads": np.ones((2, 24))},
            "plan: a plan for another deployment (experts per layer: plan 24, model 16)",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        tiny(**options)


def test_the_phase_is_needed():
    with pytest.raises(ValueError, match=r"^predict: phase is needed"):
        cmjax.predict("tiny", M)


def test_kernels_are_chosen_at_the_sizes_that_are_priced():
    """One request per rank and microbatch: what fuses with what is not as it is for many."""
    deployment = Deployment(phase="decode", model="tiny", microbatches=2, npus=4, mtp=True)
    predictor = Predictor.of(deployment, M)
    requests = Requests(batch=4, context=1024)
    symbols = predictor.symbols(requests)
    assert predictor.program.broken_assumptions({k: float(np.mean(v)) for k, v in symbols.items()})
    own = build_step(deployment, M).trace().decided_at(symbols)
    priced = price(own, M, symbols, differences=predictor.differences(requests))
    expected = float(priced.total_s + M.running().step_s)
    assert float(predictor.predict(requests).step_s) == pytest.approx(expected, rel=1e-5)
