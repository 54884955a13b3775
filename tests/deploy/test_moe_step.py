"""The deployment builder: slots of the published systems, one rank's bytes, and what is refused."""

import dataclasses
import json

import pytest

from cmjax.deploy.deployment import Deployment
from cmjax.deploy.moe_step import build_layer, build_step, schedule_for
from cmjax.deploy.predictor import Predictor
from cmjax.deploy.requests import Requests
from cmjax.hardware import load_machine, replace_leaf
from cmjax.models.moe.checkpoint.hf_config import config_json
from cmjax.models.moe.config import LatentAttention
from cmjax.models.moe.presets import deepseek_r1, tiny
from cmjax.models.moe.schedule import Schedule, overlapped_exchange, two_stream_decode
from cmjax.models.moe.slots import ep_table
from cmjax.program.size import Size

MACHINE = load_machine("cloudmatrix384")
C = deepseek_r1()
A = C.attention
assert isinstance(A, LatentAttention)


def _step(phase="decode", **options):
    return build_step(Deployment(**{"phase": phase, "microbatches": 1, **options}), MACHINE)


@pytest.mark.parametrize(
    ("phase", "npus", "slots", "shared", "copies"),
    [
        ("decode", 160, 320, 32, 9),  # EP320: 256 routed, 32 redundant, 32 shared: one a die
        ("decode", 144, 288, 32, 9),  # EP288: nothing redundant
        ("decode", 16, 256, 0, 8),  # fewer ranks than experts: 8 a die, the shared one on all
        ("prefill", 16, 288, 0, 8),  # EP32: 8 + 1 redundant a die, the shared one on all
    ],
)
def test_slots_are_those_of_the_published_systems(phase, npus, slots, shared, copies):
    step = _step(phase, npus=npus, mtp=False)
    assert (step.ranks, step.expert_slots) == (2 * npus, slots)
    assert (step.shared_slots, step.copies, step.experts_per_token) == (shared, copies, 8)
    assert (step.layers, step.microbatches, step.drafts) == (58, 1, 0)


@pytest.mark.parametrize(
    ("phase", "npus", "redundant", "slots"),
    [
        ("decode", 16, 32, 288),  # 8 + 1 a die
        ("prefill", 16, 0, 256),
        ("decode", 160, 64, 320),  # the shared expert on all dies, and in no slot
    ],
)
def test_slots_are_as_many_as_the_deployment_says(phase, npus, redundant, slots):
    step = _step(phase, npus=npus, mtp=False, redundant=redundant)
    assert (step.expert_slots, step.shared_slots, step.copies) == (slots, 0, 8)
    ranks = 2 * npus
    held = slots // ranks
    each, more = (
        _moe_layer("int8", n, ep_table(256, ranks, n * ranks - 256), local_shared=True)
        for n in (held, held + 1)
    )
    one_more = _step(phase, npus=npus, mtp=False, redundant=redundant + ranks)
    weights = [Size.of(s.weight_bytes).evaluate({}) for s in (step, one_more)]
    assert weights[1] - weights[0] == 58 * (more - each)


def _matrix(rows, columns, quant):
    """Bytes: INT8 has a float32 step per column."""
    return 2 * rows * columns if quant == "bf16" else rows * columns + 4 * columns


def _swiglu(ffn, quant):
    return _matrix(C.hidden_size, 2 * ffn, quant) + _matrix(ffn, C.hidden_size, quant)


def _attention(quant, split=1):
    """With `1 / split` of the heads' up-projections; gains are float32, the latent's up-projections
    bfloat16."""
    heads, down = C.heads // split, A.kv_lora_rank + A.qk_rope_dim
    return (
        4 * (C.hidden_size + A.q_lora_rank + A.kv_lora_rank)
        + _matrix(C.hidden_size, A.q_lora_rank, quant)
        + _matrix(A.q_lora_rank, heads * A.qk_dim, quant)
        + _matrix(C.hidden_size, down, quant)
        + 2 * heads * A.kv_lora_rank * (A.qk_nope_dim + A.v_dim)
        + _matrix(C.heads * A.v_dim, C.hidden_size, quant)
    )


def _moe_layer(quant, slots, table, *, split=1, local_shared):
    """Attention, norm, router with its bias, int32 slots and copies of every expert, experts."""
    held = slots + local_shared
    router = 4 * (C.hidden_size + 1) * C.routed_experts
    tables = 4 * len(table.slots_of_expert) * (table.max_copies + 1)
    experts = held * _swiglu(C.expert_ffn_size, quant)
    return _attention(quant, split) + 4 * C.hidden_size + router + tables + experts


@pytest.mark.parametrize("quant", ["int8", "bf16"])
@pytest.mark.parametrize(
    ("phase", "npus", "slots", "table", "split"),
    [
        ("decode", 160, 1, ep_table(256, 320, 32, 32), 1),
        ("prefill", 16, 9, ep_table(256, 32, 32), 32),  # a rank attends 4 of the 128 heads
    ],
)
def test_weights_of_a_rank_are_the_configs_to_the_byte(phase, npus, slots, table, split, quant):
    local = not table.has_shared
    moe = _moe_layer(quant, slots, table, split=split, local_shared=local)
    dense = _attention(quant, split) + 4 * C.hidden_size + _swiglu(C.ffn_size, quant)
    ends = 2 * 2 * C.vocab_size * C.hidden_size + 4 * C.hidden_size  # embedding, head; last norm
    plain = _step(phase, npus=npus, quant=quant, mtp=False)
    assert Size.of(plain.weight_bytes).evaluate({}) == ends + 3 * dense + 58 * moe
    # the draft module: one more layer, the projection that joins two states, three norms
    draft = moe + _matrix(2 * C.hidden_size, C.hidden_size, quant) + 3 * 4 * C.hidden_size
    drafting = _step(phase, npus=npus, quant=quant)
    assert drafting.drafts == 1
    assert Size.of(drafting.weight_bytes).evaluate({}) == ends + 3 * dense + 58 * moe + draft


@pytest.mark.parametrize(
    ("kv_cache", "a_token"),
    [
        ("bf16", 2 * 512 + 2 * 64),
        ("int8", 512 + 4 + 2 * 64),  # a float32 step for the latent
        ("mxfp4", 256 + 16 + 2 * 64),  # an exponent for every 32 channels
    ],
)
def test_decode_holds_a_latent_and_a_rotary_key_per_token_and_layer(kv_cache, a_token):
    step = _step(kv_cache=kv_cache, mtp=False)
    symbols = step.symbols({"batch": 96.0, "context": 4096.0})
    inputs = 4 + 4 + 3 * 4  # newest token, length; uniform number, temperature, top-p
    want = 48 * (61 * 4096 * a_token + inputs)  # two dies an NPU
    assert float(Size.of(step.state_bytes).evaluate(symbols)) == pytest.approx(want, rel=1e-6)


def test_rows_of_a_slot_are_the_tokens_copies_over_all_slots_times_the_load():
    step = _step(mtp=True)
    symbols = step.symbols({"batch": 96.0, "context": 4096.0, "load": 1.5})
    assert symbols["requests"] == 48
    assert symbols["length"] == 4096
    # two tokens a request (one drafted), nine copies of each, over 320 slots
    assert float(symbols["slot_rows"]) == pytest.approx(48 * 2 * 9 / 320 * 1.5)


def test_a_layer_alone_has_no_shared_expert_and_no_groups():
    step = build_layer("deepseek-r1", MACHINE, ranks=32, nodes=None, experts=256, redundant=32)
    assert (step.experts, step.expert_slots, step.shared_slots) == (256, 288, 0)
    assert (step.copies, step.ranks) == (8, 32)
    assert float(step.symbols({"tokens": 64.0, "rows": 576.0})["slot_rows"]) == 2


def test_streams_are_those_of_the_published_systems():
    decode, prefill = (Deployment(phase=phase, microbatches=2) for phase in ("decode", "prefill"))
    chip = MACHINE.chip
    assert schedule_for(MACHINE, decode) == two_stream_decode(chip.cube_cores, chip.vector_cores)
    assert schedule_for(MACHINE, prefill) == overlapped_exchange()
    h800 = load_machine("h800-pod")
    assert schedule_for(h800, prefill) == overlapped_exchange()
    assert schedule_for(h800, decode) == overlapped_exchange("interleaved")
    assert schedule_for(MACHINE, dataclasses.replace(decode, microbatches=1)) == Schedule()


@pytest.mark.parametrize("machine", [MACHINE, load_machine("h800-pod")], ids=lambda m: m.name)
def test_rows_are_permuted_where_the_exchange_delivers_a_token_once(machine):
    deployment = Deployment(phase="prefill", model="tiny", npus=8, microbatches=1)
    program = Predictor.of(deployment, machine).program
    kinds = {op.work.kind for level, _ in program.levels for op in level.operations}
    assert ("permute" in kinds) == machine.exchange.bulk_kernels
    assert {"dispatch", "combine"} <= kinds


@pytest.mark.parametrize("name", ["cloudmatrix384", "h800-pod"])
def test_a_rank_alone_exchanges_nothing(name):
    machine = load_machine(name)
    one_die = dataclasses.replace(machine, dies_per_npu=1)
    deployment = Deployment(phase="decode", model="tiny", npus=1, microbatches=1)
    program = Predictor.of(deployment, one_die).program
    operations = [op for level, _ in program.levels for op in level.operations]
    assert {op.work.kind for op in operations} <= {"compute", "grouped", "attention"}
    # its rows are put in the order of the experts, and added up, by one kernel each
    blocks = [op.name for op in operations if op.scope[-1:] in (("dispatch",), ("combine",))]
    assert blocks.count("cm_dispatch") == blocks.count("cm_combine") > 0
    assert all(op.work.ranks == 1 and op.work.reach == -1 for op in operations)


@pytest.mark.parametrize(("ep", "splits"), [(32, True), (64, False), (128, False)])
def test_prefill_splits_heads_over_no_more_ranks_than_the_published_instance(ep, splits):
    """Each of them gathers the latents of all, of which more ranks have more."""
    deployment = Deployment(phase="prefill", npus=ep // 2, microbatches=1)
    program = Predictor.of(deployment, MACHINE).program
    kinds = {op.work.kind for level, _ in program.levels for op in level.operations}
    assert ("collective" in kinds) == splits


def test_prefill_splits_heads_under_an_engine_that_does():
    def latency_and_sharing(machine):
        found = Predictor.of(Deployment(phase="prefill", npus=16, microbatches=1), machine)
        return float(found.predict(Requests()).ttft_s), found.step.sharing

    by_requests = replace_leaf(MACHINE, f"engines.{MACHINE.engine}.prefill_by_heads", False)
    of_heads, of_requests = latency_and_sharing(MACHINE), latency_and_sharing(by_requests)
    assert (of_heads[1], of_requests[1]) == (32, 1)
    assert of_heads[0] > 1.2 * of_requests[0]  # latents are gathered


def test_only_ranks_that_attend_to_the_same_requests_share_them():
    def step(**options):
        return build_step(Deployment(microbatches=1, npus=16, **options), MACHINE)

    assert step(phase="prefill").sharing == 32
    assert step(phase="prefill", tp=4).sharing == 4
    assert step(phase="decode").sharing == 1
    with pytest.raises(ValueError, match="batch 1 requests per NPU do not divide over 2 dies"):
        step(phase="decode").symbols({"batch": 1.0, "context": 4096.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "deepseek-r2"}, "neither a file nor a preset .* did you mean 'deepseek-r1'"),
        ({"npus": 385}, "npus 385: cloudmatrix384 has 384"),
        ({"npus": 8, "ep": 32}, "ep 32 is larger than the 16 ranks of 8 NPUs"),
        ({"npus": 12, "ep": 16}, "ep 16 does not divide the 24 ranks of 12 NPUs"),
        ({"microbatches": "auto"}, "microbatches must be 1 or 2"),
        ({"quant": "int4"}, "quant must be int8 or bf16 .* got 'int4'"),
        ({"npus": 16, "redundant": 40}, "redundant 40: .* 296 slots, .* 32 ranks; 32 or 64 would"),
        ({"npus": 16, "redundant": -1}, "redundant must be at least 0, got -1"),
        ({"model": "qwen3-8b", "redundant": 8}, "redundant 8: qwen3-8b has no experts"),
    ],
)
def test_deployments_that_cannot_be_are_refused_with_what_would_do(options, message):
    with pytest.raises(ValueError, match=message):
        _step(**options)


def test_a_dense_model_has_no_experts_to_place(tmp_path):
    dense = dataclasses.replace(tiny(), dense_layers=(0, 1, 2), mtp_layers=0)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_json(dense)))
    with pytest.raises(ValueError, match="all layers are dense; there are no experts to place"):
        build_layer(str(path), MACHINE, ranks=8, nodes=None, experts=8, redundant=0)


def test_a_table_for_another_number_of_ranks_is_refused():
    with pytest.raises(ValueError, match="made for 32 ranks; the deployment has 320"):
        build_step(Deployment(phase="decode", microbatches=1), MACHINE, ep_table(256, 32))


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does():
    step = _step(mtp=False)
    with pytest.raises(ValueError, match=r"batch 95 requests per NPU do not divide .* 96 would"):
        step.symbols({"batch": 95.0, "context": 4096.0})
