"""The benchmark of generation: what a step must read, what is refused, peers that are absent."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import generate, packed
from benchmarks.generate_models import QWEN, step_bytes, write_model
from benchmarks.generate_plot import plot_decode
from cmjax.models import moe


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN))
    return moe.load_config(path)


def _weights(experts_used: float) -> tuple[float, float]:
    """Values of matrices outside of the head that a token meets, and of norms and routers."""
    hidden, layers = 1024, 8
    attention = hidden * 64 * (16 + 2 * 4) + 16 * 64 * hidden
    experts = experts_used * 3 * hidden * 512
    small = layers * (2 * hidden + 2 * 64 + 32 * hidden) + hidden
    return layers * (attention + experts), small


def test_a_step_reads_every_expert_that_is_expected_to_be_used_once(config):
    for batch in (1, 4):
        used = 32 * (1 - (1 - 4 / 32) ** batch)
        matrices, small = _weights(used)
        keys = 2 * 8 * batch * 128 * 4 * 64
        rest = 8192 * 1024 + batch * 1024
        wanted = 4 * (matrices + small + rest + keys)
        found = step_bytes(config, "cmjax float32", batch, 128)
        assert found == pytest.approx(wanted, rel=1e-3)  # which slots hold an expert is read too


def test_few_bit_weights_are_read_as_they_lie_beside_a_bfloat16_head(config):
    matrices, small = _weights(4)
    found = step_bytes(config, "cmjax msd_w8a16", 1, 128)
    keys = 2 * 8 * 128 * 4 * (64 + 4)
    wanted = matrices + 4 * small + 2 * (8192 * 1024 + 1024) + keys
    assert found == pytest.approx(wanted, rel=0.01)  # and a scale a feature
    assert step_bytes(config, "llama.cpp Q4_0", 1, 128) < found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": (0,)}, "must be positive, got \\(0,\\)"),
        ({"prompts": ()}, "must be positive"),
        ({"peers": ("vllm",)}, "--peers must be of transformers float32"),
        ({"arithmetics": ("int3",)}, "arithmetic must be one of"),
        ({"plot": "nowhere/a.png"}, "the folder .*nowhere does not exist"),
        ({"peers_python": "nowhere/python"}, "no such file"),
    ],
)
def test_bad_options_are_refused(options, message):
    for name in ("plot", "peers_python"):
        if name in options:
            options = options | {name: Path(options[name])}
    with pytest.raises(ValueError, match=message):
        generate.Options(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"places": (Path("no/such"),)}, "--places no/such: no such folder"),
        ({"rounds": 0}, "must be positive, got 0, 48 and 3"),
        ({"arithmetic": "int3"}, "arithmetic must be one of"),
    ],
)
def test_bad_options_of_starts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        packed.Options(**options)


def test_a_peer_that_is_not_installed_says_so(tmp_path):
    path = generate.HERE / "generate_peers.py"
    command = [sys.executable, "-S", str(path), "llama.cpp", "Q8_0", str(tmp_path)]  # no packages
    found = subprocess.run(command, capture_output=True, text=True, check=True, input="")
    assert "llama_cpp" in json.loads(found.stdout)["absent"]


def test_a_system_that_ends_is_an_error_with_its_last_words():
    with pytest.raises(ValueError, match="peer ended: no weights"):
        generate.System("peer", (sys.executable, "-c", "raise SystemExit('no weights')"))


def test_a_model_of_fewer_layers_is_written_for_all_sides(tmp_path):
    small = {"hidden_size": 64, "vocab_size": 64, "num_experts": 4, "moe_intermediate_size": 32}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.generate_models.QWEN", QWEN | small)
        config = write_model("qwen", tmp_path, layers=1)
    assert config.layers == 1
    assert moe.load(tmp_path).config.hidden_size == 64


def test_the_picture_compares_equal_bits(tmp_path):
    row = generate.Row(
        system="cmjax bfloat16", batch=1, prompt=8, first_token_s=1.0, decode_tokens_per_s=30.0,
        bound_tokens_per_s=40.0, peak_bytes=1,
    )  # fmt: skip
    peer = dataclasses.replace(row, system="transformers bfloat16", decode_tokens_per_s=20.0)
    faster = dataclasses.replace(row, system="cmjax int8", decode_tokens_per_s=50.0)
    plot_decode([row, faster, peer], tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "Batch 1 decodes at 1.50× transformers bfloat16 in bfloat16" in text
    plot_decode([row, faster], tmp_path / "b.svg")
    found = "Batch 1 decodes fastest in cmjax int8, at 125 % of memory"
    assert found in (tmp_path / "b.svg").read_text()
    with pytest.raises(ValueError, match="no rows"):
        plot_decode([], tmp_path / "a.svg")
