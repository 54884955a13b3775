"""Predictions of deployments: monotone where physics is, and refused where they make no sense."""

import dataclasses
import json
import re
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cmjax
from cmjax.cost.interval import interval
from cmjax.deploy.deployment import Deployment
from cmjax.deploy.moe_step import build_step
from cmjax.deploy.predict import split_options
from cmjax.deploy.prediction import calibration
from cmjax.deploy.predictor import Predictor, known_uncertainty
from cmjax.deploy.requests import Requests
from cmjax.hardware import leaf_names, load_machine
from cmjax.models.moe.checkpoint.hf_config import config_json
from cmjax.models.moe.presets import tiny

M = load_machine("cloudmatrix384")
REQUESTS = Requests(batch=96, prompt=2048, output=512, acceptance=0.7)


def predictor(phase="decode", **options):
    options = {"model": "tiny", "npus": 8, "mtp": False, "microbatches": 2} | options
    return Predictor.of(Deployment(phase=phase, **options), M)


@pytest.fixture(scope="module")
def decode():
    return predictor()


@pytest.fixture(scope="module")
def prefill():
    return predictor("prefill", microbatches=1)


def test_a_larger_batch_or_context_takes_longer_and_more_memory(decode):
    def at(**change):
        requests = dataclasses.replace(REQUESTS, **change)
        return decode.predict(requests).to_dict(), sum(decode.memory_bytes(requests).values())

    for name, values in (("batch", (8, 96, 960)), ("prompt", (256, 4096, 65536))):
        found = [at(**{name: v}) for v in values]
        steps, memory = [f["step_ms"] for f, _ in found], [m for _, m in found]
        assert steps == sorted(set(steps)) and memory == sorted(set(memory)), name


@pytest.mark.parametrize("microbatches", [1, 2])
def test_every_batch_takes_longer_than_the_one_before_however_little_computes(microbatches):
    whole = predictor(model="deepseek-r1", npus=160, mtp=True, microbatches=microbatches)
    steps = whole.step_times_s(dataclasses.replace(REQUESTS, context=4096.0), np.arange(4, 132, 4))
    assert (np.diff(steps) > 0).all()


def test_a_longer_prompt_takes_longer_to_prefill(prefill):
    found = [
        prefill.predict(Requests(batch=4, prompt=p)).to_dict()["ttft_ms"] for p in (256, 1024, 4096)
    ]
    assert found == sorted(set(found))


def test_results_follow_from_the_step_time(decode, prefill):
    result = decode.predict(REQUESTS).to_dict()
    assert result["step_ms"] == result["tpot_ms"]  # without MTP a step is a token
    assert result["tokens_per_s_per_npu"] == pytest.approx(96 / result["step_ms"] * 1e3)
    host = M.running().step_s * 1e3
    device = float(decode.timeline(REQUESTS).total_s) * 1e3
    assert result["step_ms"] == pytest.approx(device + host, rel=1e-6)
    assert result["calibration"] == calibration(M) and len(result["calibration"]) >= 5
    first = prefill.predict(Requests(batch=4, prompt=1024)).to_dict()
    assert first["tokens_per_s_per_npu"] == pytest.approx(4 * 1024 / first["ttft_ms"] * 1e3)


def test_memory_is_weights_and_caches(decode):
    memory = decode.memory_bytes(REQUESTS)
    per_token = 3 * (16 + 8) * 2  # layers x (latent + rotary) x BF16
    caches = REQUESTS.batch / M.dies_per_npu * (REQUESTS.prompt + REQUESTS.output) * per_token
    total = sum(memory.values())
    assert caches < total < 1.1 * caches + float(decode.step.weight_bytes.constant)
    shown = decode.predict(REQUESTS).to_dict()
    assert sum(shown["hbm_gb_per_die"].values()) == pytest.approx(total / 1e9)
    assert shown["fits_hbm"] is True
    assert decode.predict(dataclasses.replace(REQUESTS, prompt=1e9)).to_dict()["fits_hbm"] is False


def test_bf16_is_slower_and_larger_than_int8():
    # Expert weights of DeepSeek's size on few ranks: the step reads them all.
    options = {"model": "deepseek-v3", "npus": 32, "microbatches": 1}
    int8, bf16 = (predictor(quant=q, **options) for q in ("int8", "bf16"))
    requests = Requests(batch=32, prompt=1024)
    assert (
        bf16.predict(requests).to_dict()["step_ms"]
        > 1.2 * int8.predict(requests).to_dict()["step_ms"]
    )
    ratio = bf16.step.weight_bytes.constant / int8.step.weight_bytes.constant
    assert 1.7 < ratio <= 2.0


def test_the_largest_batch_meets_the_slo_and_the_next_one_does_not(decode):
    requests = dataclasses.replace(REQUESTS, prompt=65536)
    for factor in (1.05, 1.5):
        slo = factor * decode.predict(requests).to_dict()["tpot_ms"]
        found = decode.largest_batch(requests, slo)
        step = M.dies_per_npu * decode.deployment.microbatches
        following = dataclasses.replace(found, batch=found.batch + step)
        assert found.batch >= requests.batch
        assert (
            decode.predict(found).to_dict()["tpot_ms"]
            <= slo
            < decode.predict(following).to_dict()["tpot_ms"]
        )


@pytest.mark.parametrize(
    ("machine", "options", "layers", "width"),
    [
        # 61 layers and the draft module's; a latent of 512 and a rotary key of 64
        ("cloudmatrix384", {"model": "deepseek-r1", "npus": 16}, 62, 576),
        # 80 layers, one of 8 key and value heads of 128 on each of 8 ranks
        ("h800-pod", {"model": "llama3-70b", "npus": 8, "tp": 8}, 80, 2 * 128),
    ],
)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_prefill_holds_the_caches_that_it_makes(machine, options, layers, width, microbatches):
    batch, prompt = 8.0, 4096.0
    options = options | {"phase": "prefill", "microbatches": microbatches}
    found = cmjax.predict(machine=machine, batch=batch, prompt=prompt, **options)
    requests = batch / found.machine.dies_per_npu * options.get("tp", 1)
    inputs = requests * prompt * 4  # int32 tokens
    caches = requests * prompt * layers * width * 2
    assert caches <= found.memory_bytes["caches"] <= caches + 1.1 * inputs


@pytest.mark.parametrize(
    ("options", "want"),
    [
        # 32 requests of a die, each with its own length; those of four dies at a time
        ({"phase": "decode", "context": 4096.0}, 0.5 / 32**0.5),
        ({"phase": "decode", "context": 4096.0, "tp": 4}, 0.5 / 128**0.5),
        # all ranks attend to the same prompts, of which each has a part of the heads
        ({"phase": "prefill"}, 0.0),
        ({"phase": "decode", "context": 4096.0, "model": "llama3-70b", "npus": 4, "tp": 8}, 0.0),
    ],
)
def test_lengths_differ_between_ranks_that_do_not_share_requests(options, want):
    fields = {"npus": 16, "microbatches": 1, "batch": 64.0, "context_spread": 0.5} | options
    deployment, requests = split_options(fields.pop("model", "deepseek-r1"), None, fields)
    found = Predictor.of(deployment, load_machine("cloudmatrix384")).differences(requests)
    assert found.attention == pytest.approx(want, rel=1e-6)


def test_a_model_file_that_changes_is_read_again(tmp_path):
    def step_s(layers):
        config = dataclasses.replace(tiny(), layers=layers)
        (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
        path = str(tmp_path / "config.json")
        found = cmjax.predict(path, phase="decode", npus=8, batch=96.0, context=4096.0)
        return float(found.step_s)

    assert step_s(8) > 1.2 * step_s(4)


def test_a_search_that_memory_ends_returns_the_last_batch_that_fits(decode):
    requests = dataclasses.replace(REQUESTS, prompt=4e6)
    found = decode.largest_batch(requests, 1e9)
    step = M.dies_per_npu * decode.deployment.microbatches

    def fits(batch):
        memory = decode.memory_bytes(dataclasses.replace(requests, batch=batch))
        return sum(memory.values()) <= M.chip.hbm_bytes

    assert fits(found.batch) and not fits(found.batch + step)


def test_an_slo_that_no_batch_meets_is_refused(decode):
    message = "slo-tpot-ms 0.001 cannot be met: a batch of 4 per NPU already takes "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        decode.largest_batch(REQUESTS, 1e-3)
    with pytest.raises(ValueError, match=r"^not even a batch of 4 per NPU fits HBM; use more NPUs"):
        decode.largest_batch(dataclasses.replace(REQUESTS, prompt=1e12), 1.0)


def test_an_uneven_load_is_slower_and_one_per_layer_is_between(decode):
    def ms(load):
        return decode.predict(dataclasses.replace(REQUESTS, load=load)).to_dict()["step_ms"]

    # Large batches, so that rows and not start-up times count.
    even, layered, uneven = ms(1.0), ms(np.array([1.0, 6.0])), ms(6.0)
    assert decode.step.layers == 2
    assert even < layered < uneven


def test_without_a_load_the_scatter_of_a_finite_batch_counts(decode):
    even = decode.predict(dataclasses.replace(REQUESTS, load=1.0)).to_dict()["step_ms"]
    assert decode.predict(REQUESTS).to_dict()["step_ms"] > even


@pytest.mark.slow
def test_sensitivities_name_what_the_step_waits_for(decode):
    found = decode.sensitivity(REQUESTS)
    sizes = [abs(v) for v in found.values()]
    assert sizes == sorted(sizes, reverse=True) and 0 not in sizes
    assert found["chip.matrix_startup_s"] > 0 > found["chip.hbm_bytes_per_s"]
    # Time is homogeneous: every rate up by 1 % and every delay down by 1 % saves 1 %; counts such
    # as cores and fractions enter a rate, or change only how kernels disturb one another.
    units = ("_s", "_flops", "_bit", "bytes_per_s")
    dimensional = sum(
        value if k.endswith("_s") and "_per_s" not in k else -value
        for k, value in found.items()
        if k.split(".")[0] in ("chip", "fabric", "exchange", "engines")
        and any(u in k for u in units)
        and k != "chip.l2_bytes"
    )
    assert dimensional == pytest.approx(1, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [4, 96])
def test_a_sensitivity_is_the_difference_that_predictions_show(decode, batch):
    """Also at one request per rank and microbatch, where other kernels are chosen than traced."""
    requests = dataclasses.replace(REQUESTS, batch=batch)

    def device_s(startup_s):
        chip = dataclasses.replace(M.chip, matrix_startup_s=startup_s)
        machine = dataclasses.replace(M, chip=chip)
        step_s = dataclasses.replace(decode, machine=machine).predict(requests).step_s
        return float(step_s) - float(M.running().step_s)

    startup_s = float(M.chip.matrix_startup_s)
    slope = (device_s(1.02 * startup_s) - device_s(0.98 * startup_s)) / 0.04 / device_s(startup_s)
    found = decode.sensitivity(requests)["chip.matrix_startup_s"]
    assert found == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ep": 32}, "ep 32 is larger than the 16 ranks of 8 NPUs"),
        ({"ep": 6}, "ep 6 does not divide the 16 ranks of 8 NPUs"),
        ({"npus": 400}, "npus 400: cloudmatrix384 has 384"),
        ({"npus": 0}, "npus must be at least 1, got 0"),
        ({"ep": -1}, "ep must be at least 1 (or 0 for all ranks), got -1"),
        ({"phase": "both"}, "phase must be decode or prefill, got 'both'"),
        ({"microbatches": 3}, "microbatches must be auto or 1 or 2, got 3"),
        (
            {"quant": "int3"},
            "quant must be int8 or bf16 or msd_w8a16 or msd_w4a16 or w4a8, got 'int3'",
        ),
        ({"kv_cache": "fp8"}, "kv_cache must be bf16 or int8 or mxfp4, got 'fp8'"),
        (
            {"model": "deepseek-r2"},
            "load_config: 'deepseek-r2' is neither a file nor a preset (deepseek-r1, deepseek-v3, "
            "glm-4.5-air, glm-4.7, kimi-k2, llama3-70b, llama3-8b, qwen3-235b-a22b, qwen3-30b-a3b, "
            "qwen3-32b, qwen3-8b, tiny); did you mean 'deepseek-r1'?",
        ),
    ],
)
def test_a_deployment_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        options = {"phase": "decode", "model": "tiny", "npus": 8, "microbatches": 2, **options}
        build_step(Deployment(**options), M)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch": 0}, "batch must be positive, got 0"),
        ({"batch": float("nan")}, "batch must be a finite number, got nan"),
        ({"prompt": -5}, "prompt must be positive, got -5"),
        ({"output": -1}, "output must be at least 0, got -1"),
        ({"acceptance": 1.5}, "mtp-acceptance must lie in 0..1, got 1.5"),
        ({"load": 0.9}, "load must be at least 1, got 0.9"),
        ({"load": float("nan")}, "load must be a finite number, got nan"),
        ({"acceptance": -0.1}, "mtp-acceptance must lie in 0..1, got -0.1"),
    ],
)
def test_requests_that_make_no_sense_are_refused(decode, change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        decode.predict(dataclasses.replace(REQUESTS, **change))


def test_a_batch_that_does_not_divide_is_refused_with_one_that_would(decode):
    message = "batch 97 requests per NPU do not divide over 2 dies x 2 microbatches; 96 would"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        decode.predict(dataclasses.replace(REQUESTS, batch=97)).to_dict()


@pytest.mark.parametrize(
    "acceptance, drafts, tokens",
    [(0.7, 1, 1.7), (0.5, 3, 1.875), ((0.8, 0.5, 0.5), 3, 2.4), (0.9, 0, 1.0)],
)
def test_a_draft_counts_if_all_before_it_were_accepted(acceptance, drafts, tokens):
    assert Requests(acceptance=acceptance).tokens_per_step(drafts) == pytest.approx(tokens)


def test_acceptances_of_another_number_of_drafts_are_refused():
    with pytest.raises(ValueError, match=r"^mtp-acceptance has 2 numbers for 3 draft\(s\)"):
        Requests(acceptance=(0.8, 0.5)).tokens_per_step(3)


def test_an_engine_that_the_machine_does_not_know_is_refused():
    deployment = Deployment(phase="decode", model="tiny", npus=8, engine="triton", microbatches=1)
    with pytest.raises(ValueError, match=r"^engine 'triton' is not known on cloudmatrix384"):
        Predictor.of(deployment, M)


def test_a_serving_engine_adds_its_host_time():
    common = {"phase": "decode", "model": "tiny", "npus": 8, "microbatches": 1}
    requests = Requests(batch=96, context=4096)
    one, other = (
        Predictor.of(Deployment(**common, engine=name), M)
        for name in ("cloudmatrix-infer", "vllm-ascend")
    )
    more = float(other.predict(requests).step_s - one.predict(requests).step_s)
    want = M.running("vllm-ascend").host_s(1) - M.running("cloudmatrix-infer").host_s(1)
    assert more == pytest.approx(want, rel=1e-4)  # their kernels take the same time for a copy


def test_the_interval_of_a_prediction_holds_it_and_names_a_measurement():
    found = cmjax.predict("tiny", M, phase="decode", npus=8, batch=96, context=4096)
    for key, value in found.headlines().items():
        low, high = found.interval[key]
        assert low < float(value) < high
    assert found.width_from.startswith("measure ")
    assert found.to_dict()["interval"].keys() == found.headlines().keys()


def test_the_interval_is_of_what_the_machines_file_says_now(tmp_path):
    text = (resources.files("cmjax.hardware") / "catalog/cloudmatrix384.toml").read_text("utf-8")
    startups = re.compile(r"^(\w+_startup_s = .*?)(?:, spread = .*)? }$", re.MULTILINE)
    unsure = startups.sub(r'\1, spread = "300 %" }', text)
    path, widths = tmp_path / "mine.toml", []
    for said in (text, unsure):
        path.write_text(said, encoding="utf-8")
        found = cmjax.predict("tiny", path, phase="decode", npus=8, batch=96, context=4096)
        low, high = found.interval["step_ms"]
        widths.append(high / low)
    assert widths[1] > 1.2 * widths[0]


def test_intervals_are_those_of_the_gradient_of_the_price(decode):
    known = known_uncertainty(M)
    assert known is not None
    leaves, tree = jax.tree.flatten(decode.machine)
    at = [leaf_names(M).index(key) for key in known.keys]

    def logs(scales):
        machine = jax.tree.unflatten(
            tree, [leaf * s for leaf, s in zip(leaves, scales, strict=True)]
        )
        found = dataclasses.replace(decode, machine=machine).predict(REQUESTS)
        return jnp.log(jnp.stack([found.step_s, found.per_layer_s]))

    predicted = decode.predict(REQUESTS)
    found, slopes = decode.intervals(predicted), jax.jacrev(logs)([1.0] * len(leaves))
    for key, elasticity in zip(("step_ms", "per_layer_us"), np.array(slopes)[at].T, strict=True):
        expected = interval(float(predicted.headlines()[key]), elasticity, known)
        assert found[key].low == pytest.approx(expected.low, rel=1e-3)
        assert found[key].high == pytest.approx(expected.high, rel=1e-3)
