"""Loading takes the model's memory and little more, measured in a process of its own."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cmjax.models.moe.checkpoint.hf_config import config_json
from cmjax.models.moe.checkpoint.safetensor_file import TensorSpec, write_tensors
from cmjax.models.moe.checkpoint.tensor_names import weight_mappings
from cmjax.models.moe.config import GroupedAttention, MoEConfig
from cmjax.models.moe.positions import Rope

LARGE = MoEConfig(
    vocab_size=16384,
    hidden_size=1024,
    layers=2,
    dense_layers=(),
    heads=8,
    attention=GroupedAttention(kv_heads=2, head_dim=64),
    ffn_size=2048,
    expert_ffn_size=2048,
    routed_experts=8,
    shared_experts=0,
    experts_per_token=2,
    expert_groups=1,
    groups_per_token=1,
    scoring="softmax",
    score_bias=False,
    group_best=1,
    rope=Rope(interleave=False),
    family="mixtral",
)
MEASURE = """
import json, pathlib, re, sys
import jax
from cmjax.models.moe.checkpoint.load import load
from cmjax.models.moe.model import parameters
status = pathlib.Path("/proc/self/status")       # getrusage counts the parent's peak as well
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
load(sys.argv[1])                              # compiles and allocates what a process does once
before = peak()
model = load(sys.argv[2], precision=sys.argv[3])
leaves = jax.tree.leaves(parameters(model))
down = parameters(model)["main"]["moe"]["layers"]["moe"]["experts"]["down"]
expert = down["weight" if "weight" in down else "scale"]
print(json.dumps({
    "model": sum(leaf.nbytes for leaf in leaves),
    "beyond": peak() - before - sum(leaf.nbytes for leaf in leaves),
    "expert": float(expert[1, 7, 5, 3]),
}))
"""


def _write(folder, config, dtype):
    folder.mkdir()
    listed = list(weight_mappings(config, mtp=False))
    specs = {mapping.name: TensorSpec(dtype, mapping.shape) for mapping in listed}
    tensors = ((e.name, np.full(e.shape, i % 97, dtype)) for i, e in enumerate(listed))
    write_tensors(folder / "model.safetensors", specs, tensors)
    (folder / "config.json").write_text(json.dumps(config_json(config)))
    places = {mapping.name: number % 97 for number, mapping in enumerate(listed)}
    return places, max(math.prod(mapping.shape) for mapping in listed)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "msd_w4a16"])
def test_loading_needs_at_most_three_times_the_largest_tensor_beyond_the_model(tmp_path, precision):

    small = dataclasses.replace(
        LARGE, vocab_size=64, hidden_size=64, ffn_size=32, expert_ffn_size=32
    )
    _write(tmp_path / "small", small, np.float32)
    values, largest = _write(tmp_path / "large", LARGE, np.float32)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large", precision],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    print(found, largest * 4)
    if precision == "msd_w4a16":
        assert found["model"] < 130e6
    else:
        assert found["model"] > 250e6
        assert found["expert"] == values["model.layers.1.block_sparse_moe.experts.7.w2.weight"]
    assert found["beyond"] <= 3 * largest * 4
