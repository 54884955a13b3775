"""Services of tensor-parallel groups, of several drafts a step, and with uneven experts."""

import dataclasses

import numpy as np
import pytest

import cmjax
from cmjax.deploy import Predictor, Requests
from cmjax.hardware import load_machine
from cmjax.serving import (
    DecodePool,
    PrefillPool,
    Service,
    generate,
    price_service,
    read_service,
    serve,
)
from cmjax.serving.assemble import decode_steps
from cmjax.serving.engine.table import Lookup
from cmjax.serving.planner import plan
from cmjax.sweep import executor_of

MACHINE = load_machine("cloudmatrix384")
SERVICE = Service(
    model="tiny", prefill=PrefillPool(npus=4, tokens=8192, tp=2),
    decode=DecodePool(npus=4, batch=8, tp=4), drafts=2, acceptance=(0.9, 0.6), load=1.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def times():
    return price_service(SERVICE, MACHINE)


def test_a_file_says_groups_drafts_and_load(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'model = "tiny"\ndrafts = 2\nacceptance = [0.9, 0.6]\nload = 1.5\n'
        "[prefill]\nnpus = 4\ntokens = 8192\ntp = 2\n[decode]\nnpus = 4\nbatch = 8\ntp = 4\n"
    )
    assert read_service(path) == dataclasses.replace(SERVICE, name="mine")


@pytest.mark.parametrize("each", [1.0, 4.0])  # requests per group
def test_a_decode_step_is_that_of_a_prediction(times, each):
    context = float(times.tables["decode"].context[5])
    assert times.ranks["decode"] == 4 * 2 // 4  # groups of the instance
    found = Lookup(times.tables["decode"]).step_s(0, 0.0, each, context, 0, 0)
    steps = [
        cmjax.predict(
            "tiny", MACHINE, phase="decode", npus=4, tp=4, drafts=2, acceptance=(0.9, 0.6),
            load=1.5, batch=each * 2 / 4, context=context, microbatches=count,
        ).step_s
        for count in ((1, 2) if each > 1 else (1,))
    ]  # fmt: skip
    assert found == pytest.approx(float(min(steps)), rel=1e-6)
    even = dataclasses.replace(SERVICE, load=None)
    assert price_service(even, MACHINE).tables["decode"].batch_s.max() != pytest.approx(
        times.tables["decode"].batch_s.max()
    )


@pytest.mark.slow
def test_a_prefill_step_is_that_of_a_prediction(times):
    table = times.tables["prefill"]
    tokens, length = float(table.tokens[-1]), float(table.length[3])
    found = Lookup(table).step_s(int(tokens), length, 0, 0.0, 0, 0)
    step = cmjax.predict(
        "tiny", MACHINE, phase="prefill", npus=4, tp=2, load=1.5, batch=tokens / length / 4,
        prompt=length,
    ).step_s  # fmt: skip
    assert found == pytest.approx(float(step), rel=1e-6)


@pytest.mark.parametrize(("model", "copies"), [("tiny", 4), ("qwen3-8b", 1)])
def test_an_instance_holds_the_tokens_that_fill_its_memory(model, copies):
    """Every die of a group holds the latents of all heads, or the keys and values of its own."""
    service = dataclasses.replace(
        SERVICE, model=model, quant="bf16", load=None, drafts=1, acceptance=0.7
    )
    found = price_service(service, MACHINE)
    predictor = Predictor.of(service.deployment("decode").choices()[0], MACHINE)
    context = 65536.0
    requests = round(found.kv_tokens["decode"] / context / 2) * 2  # of two groups
    filled = predictor.memory_bytes(Requests(batch=requests / 4, context=context))
    room = float(MACHINE.chip.hbm_bytes) * service.memory_fraction
    assert sum(map(float, filled.values())) == pytest.approx(room, rel=0.03)
    one, two = (
        float(predictor.memory_bytes(Requests(batch=2.0, context=c))["caches"]) for c in (1e4, 2e4)
    )
    assert (two - one) / 1e4 == pytest.approx(copies * found.kv_token_bytes)  # of a request a die


@pytest.mark.parametrize(
    ("acceptance", "drafts"), [(0.7, 1), (0.7, 3), ((0.9, 0.5), 2), (1.0, 2), (0.0, 2)]
)
def test_steps_to_the_last_token_are_those_of_drafts_drawn_one_by_one(acceptance, drafts):
    rng, tokens, requests = np.random.default_rng(0), 60, 4000
    each = np.broadcast_to(acceptance, drafts)
    accepted = np.cumprod(rng.random((requests, tokens, drafts)) < each, axis=-1).sum(-1)
    drawn = 1 + (np.cumsum(1 + accepted, axis=1) < tokens).sum(1)
    gain = Requests(acceptance=acceptance).gain(drafts)
    found = decode_steps(np.full(requests, tokens + 1), gain, seed=1)
    assert found.min() >= -(-tokens // (1 + drafts)) and found.max() <= tokens
    assert found.mean() == pytest.approx(drawn.mean(), abs=0.6)  # the last step may give too many
    assert found.std() == pytest.approx(drawn.std(), rel=0.08, abs=0.01)


@pytest.mark.slow
def test_more_drafts_shorten_what_a_token_takes():
    trace = generate(requests=40, rate=1.0, prompt=2048, output=40)
    one, two = (
        serve(trace, dataclasses.replace(SERVICE, drafts=n, acceptance=0.9), uncertainty=0)
        for n in (1, 2)
    )
    assert two.to_dict()["tpot_ms"]["mean"] < one.to_dict()["tpot_ms"]["mean"]


@pytest.mark.slow
def test_a_plan_keeps_the_groups_of_its_service():
    trace = generate(requests=100, rate=10.0, prompt=2048, output=20)
    with executor_of(workers=1) as executor:
        found = plan(
            trace, npus=12, slo_ttft_ms=100, slo_tpot_ms=20, service=SERVICE, prefill_npus=(4,),
            decode_npus=(4,), executor=executor,
        )  # fmt: skip
    pools = found.best.service.pools
    assert [(name, pool.tp) for name, pool in pools.items()] == [("prefill", 2), ("decode", 4)]
    assert found.best.service.drafts == 2 and found.best.attainment >= 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"acceptance": (0.9, 1.7)}, "acceptance must lie in 0..1, got 1.7"),
        ({"acceptance": (0.9,)}, "acceptance has 1 numbers for 2 draft"),
        ({"drafts": 9}, "drafts must lie in 1..8"),
        ({"load": 0.5}, "load must be at least 1, got 0.5"),
        ({"decode": DecodePool(npus=4, tp=0)}, "decode.tp must be at least 1"),
        ({"decode": DecodePool(npus=4, tp=3)}, "tp 3 does not divide"),
    ],
)
def test_groups_drafts_and_loads_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        serve("poisson:rate=1,requests=2", dataclasses.replace(SERVICE, **changes))
