"""Dense models are served too: data parallelism alone, and no expert anywhere."""

import numpy as np
import pytest

import cmjax
from cmjax.hardware import load_machine
from cmjax.models.moe.presets import llama3_8b, qwen3_8b

MACHINE = load_machine("cloudmatrix384")


def _weights(config):
    """INT8 matrices of the layers, a bfloat16 embedding and head; norms and steps left out."""
    kv = 2 * config.attention.kv_heads * config.attention.head_dim
    heads = config.heads * config.attention.head_dim
    layer = config.hidden_size * (2 * heads + kv + 3 * config.ffn_size)
    return config.layers * layer + 2 * 2 * config.vocab_size * config.hidden_size


@pytest.mark.parametrize("name, config", [("qwen3-8b", qwen3_8b()), ("llama3-8b", llama3_8b())])
def test_a_decode_reads_weights_and_caches_once(name, config):
    found = cmjax.predict(name, MACHINE, phase="decode", npus=1, batch=32, context=1536, output=0)
    cache = 16 * 1536 * config.layers * 2 * 2 * config.attention.kv_heads * 128
    memory = found.memory_bytes
    assert memory["weights"] == pytest.approx(_weights(config), rel=2e-3)
    assert memory["caches"] == pytest.approx(cache, rel=2e-2)
    chip = MACHINE.chip
    embedding = 2 * config.vocab_size * config.hidden_size  # only some of its rows are read
    least_s = (_weights(config) - embedding + cache) / chip.hbm_bytes_per_s
    assert least_s < float(found.step_s) < 2 * least_s
    assert found.tokens_per_step == 1.0  # it drafts nothing
    assert "waiting for the slowest rank" not in found.breakdown_s


def test_ranks_share_nothing():
    one, eight = (
        cmjax.predict("qwen3-8b", MACHINE, phase="decode", npus=n, batch=32, context=512)
        for n in (1, 8)
    )
    assert float(one.step_s) == pytest.approx(float(eight.step_s), rel=1e-5)


def test_there_is_nothing_to_place():
    with pytest.raises(ValueError, match="all layers are dense; there are no experts to place"):
        cmjax.place(np.ones((36, 8)), MACHINE, model="qwen3-8b", ranks=8)
