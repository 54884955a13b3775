"""DeepSeek-R1 (671B) decoding on 320 ranks: traced whole, against closed forms from its config."""

import pytest

from cmjax.deploy.deployment import Deployment
from cmjax.deploy.predictor import Predictor
from cmjax.deploy.requests import Requests
from cmjax.hardware import load_machine, replace_leaf
from cmjax.models.moe.presets import deepseek_r1

NPUS, RANKS = 160, 320
BATCH, CONTEXT = 96.0, 4096.0  # requests per NPU
LOAD = 1.25
C = deepseek_r1()
A = C.attention


@pytest.fixture(scope="module")
def decode():
    machine = load_machine("cloudmatrix384")
    return Predictor.of(Deployment(phase="decode", npus=NPUS, mtp=False, microbatches=2), machine)


def products():
    """Multiply-adds of one token by where they are, from the architecture's equations."""
    projections = (
        C.hidden_size * A.q_lora_rank
        + A.q_lora_rank * C.heads * A.qk_dim
        + C.hidden_size * (A.kv_lora_rank + A.qk_rope_dim)
        + C.heads * A.v_dim * C.hidden_size
    )
    absorbed = C.heads * A.kv_lora_rank * (A.qk_nope_dim + A.v_dim)
    latent = CONTEXT * C.heads * (2 * A.kv_lora_rank + A.qk_rope_dim)
    return {
        "projections": C.layers * projections,
        "absorbed": C.layers * absorbed,
        "latent": C.layers * latent,
        "dense": len(C.dense_layers) * 3 * C.hidden_size * C.ffn_size,
        "router": C.moe_layers * C.hidden_size * C.routed_experts,
        "expert": C.moe_layers * 3 * C.hidden_size * C.expert_ffn_size,
        "head": C.hidden_size * C.vocab_size,
    }


def test_flops_of_a_decode_step_are_the_architectures(decode):
    totals = decode.program.totals(
        decode.step.symbols({"batch": BATCH, "context": CONTEXT, "load": LOAD})
    )
    tokens = BATCH / 2  # two dies an NPU
    each = products()
    experts = (C.experts_per_token + C.shared_experts) * LOAD * each.pop("expert")
    want = 2 * tokens * (sum(each.values()) + experts)
    cube = {k: v for k, v in totals.items() if k.startswith("cube")}
    assert sum(cube.values()) == pytest.approx(want, rel=1e-2)
    # Projections and experts run on the 8-bit rate.
    eight = 2 * tokens * (each["projections"] + each["dense"] + experts)
    assert cube["cube_flops_8bit"] == pytest.approx(eight, rel=1e-2)


def test_weight_bytes_of_a_rank_are_the_architectures(decode):
    each = products()
    one_byte = each["projections"] + each["dense"] + each["expert"]  # one slot a rank
    two_bytes = each["absorbed"] + 2 * each["head"]  # with the embedding table
    want = one_byte + 2 * two_bytes + 4 * each["router"]
    assert decode.step.weight_bytes.constant == pytest.approx(want, rel=1e-2)


def test_a_decode_step_reads_its_weights_and_caches_at_least_once(decode):
    totals = decode.program.totals(
        decode.step.symbols({"batch": BATCH, "context": CONTEXT, "load": LOAD})
    )
    embedding = C.vocab_size * C.hidden_size * 2  # of which only rows are read
    weights = decode.step.weight_bytes.constant - embedding
    caches = BATCH / 2 * CONTEXT * C.layers * (A.kv_lora_rank + A.qk_rope_dim) * 2
    assert weights + caches < totals["read_bytes"]
    # Two microbatches read the layers' weights twice.
    assert totals["read_bytes"] < 3 * (weights + caches)


def test_bytes_on_the_fabric_are_those_of_dispatch_and_combine(decode):
    totals = decode.program.totals(
        decode.step.symbols({"batch": BATCH, "context": CONTEXT, "load": LOAD})
    )
    copies = BATCH / 2 * (C.experts_per_token + C.shared_experts) * LOAD
    a_copy = 7680 + 2 * C.hidden_size  # INT8 with its scale out, BF16 back
    sent = sum(totals[f"{tier}_bytes"] for tier in ("die", "node", "supernode"))
    assert sent == pytest.approx(C.moe_layers * copies * a_copy * (RANKS - 1) / RANKS, rel=1e-3)
    # 319 peers: the other die, 14 dies of the node, 304 on other nodes.
    assert totals["die_bytes"] * 304 == pytest.approx(totals["supernode_bytes"], rel=1e-9)
    assert totals["node_bytes"] == pytest.approx(14 * totals["die_bytes"], rel=1e-9)


def test_the_step_is_slower_than_every_engines_peak_and_fits_memory(decode):
    requests = Requests(batch=BATCH, prompt=CONTEXT, load=LOAD)
    totals = decode.program.totals(decode.symbols(requests))
    chip = decode.machine.chip
    device_s = float(decode.timeline(requests).total_s)
    bounds = {
        "cube": totals["cube_flops_8bit"] / chip.cube_flops_8bit
        + totals["cube_flops_16bit"] / chip.cube_flops_16bit,
        "hbm": totals["read_bytes"] / chip.hbm_bytes_per_s,
        "fabric": totals["supernode_bytes"] / decode.machine.fabric.supernode.bandwidth_bytes_per_s,
    }
    assert max(bounds.values()) < device_s < 5 * sum(bounds.values())
    result = decode.predict(requests).to_dict()
    assert result["fits_hbm"]
    assert result["per_layer_us"] * 58 < result["step_ms"] * 1e3
    assert decode.step.layers == C.moe_layers
    operations = sum(len(level.operations) for level, _ in decode.program.levels)
    assert operations < 300  # and not 61 times a layer's


def test_an_engine_without_a_fused_prolog_pays_for_its_kernels():
    deployment = Deployment(phase="decode", model="tiny", npus=4, microbatches=1)
    requests = Requests(batch=8, context=256)
    fused, apart = (
        sum(s for scope, s in predicted.breakdown_s.items() if scope.startswith("attention/prolog"))
        for predicted in (
            Predictor.of(deployment, _lacking(kernels)).predict(requests)
            for kernels in ((), ("MLAProlog",))
        )
    )
    vector_s = float(_lacking(()).chip.vector_startup_s)
    assert float(apart) > float(fused) + 3 * 8 * vector_s  # three layers, more than eight kernels


def _lacking(kernels):
    machine = load_machine("h800-pod")
    return replace_leaf(machine, f"engines.{machine.engine}.unfused", kernels)
