"""Deployments with tensor parallelism: one rank's bytes, what it sends, and what is refused."""

import re

import pytest

import cmjax
from cmjax.cost.measured import Measurement
from cmjax.deploy.deployment import Deployment
from cmjax.deploy.moe_step import build_step
from cmjax.deploy.predictor import Predictor
from cmjax.deploy.requests import Requests
from cmjax.deploy.validation import compare
from cmjax.hardware import load_machine
from cmjax.models.moe.config import GroupedAttention
from cmjax.models.moe.presets import qwen3_8b
from cmjax.program.size import Size

M = load_machine("cloudmatrix384")
C = qwen3_8b()
A = C.attention


def _dense(tp):
    options = {"model": "qwen3-8b", "npus": 8, "microbatches": 1, "quant": "bf16"}
    return build_step(Deployment(phase="decode", tp=tp, **options), M)


@pytest.mark.parametrize("tp", [1, 2, 16])
def test_a_rank_holds_its_part_of_weights_and_caches_to_the_byte(tp):
    step = _dense(tp)
    assert isinstance(A, GroupedAttention)
    kv = max(1, A.kv_heads // tp)
    heads = C.heads // tp
    attention = C.hidden_size * (heads + 2 * kv) * A.head_dim + heads * A.head_dim * C.hidden_size
    ffn = 3 * C.hidden_size * C.ffn_size // tp
    ends = 2 * (C.vocab_size // tp) * C.hidden_size
    gains = 4 * (C.layers * (2 * C.hidden_size + 2 * A.head_dim) + C.hidden_size)
    want = 2 * (C.layers * (attention + ffn) + ends) + gains
    assert Size.of(step.weight_bytes).evaluate({}) == want
    symbols = step.symbols({"batch": 32.0, "context": 1024.0})
    held = float(Size.of(step.state_bytes).evaluate(symbols))
    cache = 16 * tp * 1024 * C.layers * 2 * kv * A.head_dim * 2  # the group's requests
    assert held == pytest.approx(cache + 16 * (4 + 4 + 3 * 4), rel=1e-6)


@pytest.mark.parametrize(("tp", "die", "node"), [(2, 1, 0), (4, 1, 2), (16, 1, 14)])
def test_a_layer_sends_its_tokens_to_the_group_and_sums_back_directly(tp, die, node):
    step = _dense(tp)
    program = step.trace()
    symbols = step.symbols({"batch": 32.0, "context": 1024.0})
    found = program.totals({name: float(value) for name, value in symbols.items()})
    tokens = 16
    layer = 4 * tokens * C.hidden_size * 2  # a gather and a sum of attention, and of the FFN
    # embedding: token numbers there, a sum back; head: states there, a part of the scores back;
    # lengths of the requests once
    vocabulary = C.vocab_size // tp
    ends = tokens * (4 + C.hidden_size * 2) + tokens * (C.hidden_size + vocabulary) * 2
    sent = C.layers * layer + ends + tokens * 4
    assert found["die_bytes"] == pytest.approx(sent * die, rel=1e-6)
    assert found["node_bytes"] == pytest.approx(sent * node, rel=1e-6)
    assert found["supernode_bytes"] == 0


def test_sharing_requests_makes_few_of_them_faster_and_has_a_line_of_its_own():
    requests = Requests(batch=2, context=4096)

    def found(tp):
        options = {"model": "qwen3-8b", "npus": 8, "microbatches": 1, "quant": "bf16"}
        return Predictor.of(Deployment(phase="decode", tp=tp, **options), M).predict(requests)

    alone, shared = found(1), found(4)
    assert shared.tpot_s < 0.6 * alone.tpot_s
    between = {k: v for k, v in shared.breakdown_s.items() if "tensor_parallel" in k.split("/")}
    # two all-reduces a layer, each launched once
    launches = 36 * 2 * float(M.chip.collective_startup_s)
    assert launches < sum(between.values()) < 1.5 * launches
    assert shared.to_dict()["deployment"]["tp"] == 4


def test_a_group_shares_whole_requests():
    found = cmjax.predict(
        "tiny", phase="decode", npus=2, tp=4, batch=0.5, context=64, mtp=False, microbatches=1
    )
    assert found.tpot_s > 0
    message = (
        "batch 0.3 requests per NPU do not divide over 2 dies x 1 microbatches in groups of 4 that "
        "share them; 0.5 would"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cmjax.predict(
            "tiny", phase="decode", npus=2, tp=4, batch=0.3, context=64, mtp=False, microbatches=1
        )


def test_a_search_varies_the_degree_and_says_which_are_not_possible():
    found = cmjax.search(
        "tiny", phase="decode", ep=[8], tp=[1, 2, 4, 16], context=1024, microbatches=1
    )
    assert {one.tp for one in found.deployments} == {1, 2, 4}
    assert {one.tp for one, _ in found.refused} == {16}
    assert {found.row(i)["tp"] for i in range(len(found.batch))} == {1, 2, 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 3}, "tp 3 does not divide the model's 128 heads; 1, 2, 4, 8 or 16 would do"),
        ({"tp": 0}, "tp must lie in 1..16 (1 for none), got 0"),
        ({"tp": 32}, "tp must lie in 1..16 (1 for none), got 32"),
        (
            {"tp": 16, "npus": 4},
            "tp 16 does not divide the 8 ranks that share the experts; give ep or npus that it "
            "divides",
        ),
        (
            {"model": "llama3-8b", "tp": 12},
            "tp 12 does not divide the model's 32 heads; 1, 2, 4, 8 or 16 would do",
        ),
    ],
)
def test_a_degree_that_does_not_divide_is_refused_with_what_would(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cmjax.predict(**{"model": "deepseek-r1", "phase": "decode", "batch": 16} | options)


def test_a_group_lies_in_one_node():
    h800 = load_machine("h800-pod")
    message = "tp 16 on h800-pod: 8 ranks of a node hold groups of 1, 2, 4, 8"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_step(Deployment(phase="decode", npus=32, tp=16, microbatches=1), h800)


@pytest.mark.parametrize("given", [("0.9,0.7",), ("0.9", "0.7")])
def test_a_measured_row_may_ask_for_groups_drafts_and_their_acceptances(given):
    command = (
        "predict", "decode", "--model", "tiny", "--npus", "8", "--tp", "4", "--quant", "w4a8",
        "--drafts", "2", "--mtp-acceptance", *given, "--context", "64", "--batch", "8",
    )  # fmt: skip
    row = Measurement("a step", "predict", command, "tpot_ms", 1.0, "here")
    want = cmjax.predict(
        "tiny", phase="decode", npus=8, tp=4, quant="w4a8", drafts=2, acceptance=(0.9, 0.7),
        context=64.0, batch=8.0,
    )  # fmt: skip
    assert compare(row, "cloudmatrix384").predicted == pytest.approx(float(want.tpot_s) * 1e3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0.9,x", "mtp-acceptance takes one number, or one for each draft, as 0.9,0.7; got"),
        ("0.9,0.7,0.5", "mtp-acceptance has 3 numbers for 2 draft"),
    ],
)
def test_acceptances_that_are_no_numbers_or_too_many_name_the_row(given, message):
    words = f"predict decode --model tiny --npus 8 --drafts 2 --mtp-acceptance {given}".split()
    row = Measurement("a step", "predict", tuple(words), "tpot_ms", 1.0, "here")
    with pytest.raises(ValueError, match=f"^row 'a step'.*{message}"):
        compare(row, "cloudmatrix384")
