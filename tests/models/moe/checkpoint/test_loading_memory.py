"""Loading takes the model's memory and little more, measured in a process of its own."""

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
import ctypes, gc, json, pathlib, re, sys
import jax
from cmjax.models.moe.checkpoint.load import load
from cmjax.models.moe.model import parameters

def now(key):                                  # getrusage counts the parent's peak as well
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(key + r":\\s+(\\d+)", status)[1])

load(sys.argv[1], precision=sys.argv[2])       # compiles, which takes memory once a process
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
pathlib.Path("/proc/self/clear_refs").write_text("5")    # the peak so far is forgotten
before = now("VmRSS")
model = load(sys.argv[1], precision=sys.argv[2])
leaves = jax.tree.leaves(parameters(model))
down = parameters(model)["main"]["moe"]["layers"]["moe"]["experts"]["down"]
expert = down["weight" if "weight" in down else "scale"]
print(json.dumps({
    "model": sum(leaf.nbytes for leaf in leaves),
    "beyond": now("VmHWM") - before - sum(leaf.nbytes for leaf in leaves),
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
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "msd_w4a16"])
def test_loading_needs_at_most_three_times_the_largest_tensor_beyond_the_model(tmp_path, precision):
    values, largest = _write(tmp_path / "large", LARGE, np.float32)
    env = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",  # XLA plans temporary arrays as it does for users
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "large", precision],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    if precision == "msd_w4a16":
        assert found["model"] < 130e6
    else:
        assert found["model"] > 250e6
        assert found["expert"] == values["model.layers.1.block_sparse_moe.experts.7.w2.weight"]
    assert found["beyond"] <= 3 * largest * 4, found
