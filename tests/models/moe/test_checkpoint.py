"""Reading safetensors: what is read, and what is refused."""

import dataclasses
import json
import struct

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.moe.checkpoint import load_checkpoint, read_safetensors
from models.moe.config import MoEConfig
from models.moe.deepseek import abstract_params
from models.moe.layout import one_rank

FIXTURE = "hf_fixtures/deepseek_v3_tiny"


def test_tensors_equal_those_of_the_safetensors_library(data):
    from safetensors.numpy import load_file

    path = data / FIXTURE / "model.safetensors"
    want, got = load_file(path), read_safetensors(path)
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_a_checkpoint_fills_the_one_rank_model_mtp_included(data, tmp_path):
    folder = data / FIXTURE
    config = MoEConfig.from_json(folder)
    tensors = dict(read_safetensors(folder / "model.safetensors"))
    last, mtp = f"model.layers.{config.layers - 1}.", f"model.layers.{config.layers}."
    extra = {mtp + name[len(last) :]: t for name, t in tensors.items() if name.startswith(last)}
    hidden = config.hidden_size
    for name in ("enorm", "hnorm", "shared_head.norm"):
        extra[f"{mtp}{name}.weight"] = np.ones(hidden, np.float32)
    extra[f"{mtp}eh_proj.weight"] = np.zeros((hidden, 2 * hidden), np.float32)
    save_file({k: np.array(v) for k, v in tensors.items()}, tmp_path / "model-1.safetensors")
    save_file({k: np.array(v) for k, v in extra.items()}, tmp_path / "model-2.safetensors")
    params = load_checkpoint(tmp_path, config, mtp=True)
    like = abstract_params(config, one_rank(config), "float32", mtp=True)
    assert jax.tree.structure(params) == jax.tree.structure(like)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(like), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)


def test_a_missing_tensor_is_named(data):
    config = dataclasses.replace(MoEConfig.from_json(data / FIXTURE), layers=4)
    with pytest.raises(ValueError, match=r"no tensor 'model.layers.3"):
        load_checkpoint(data / FIXTURE, config)


def _file(path, dtype, offsets):
    header = json.dumps({"w": {"dtype": dtype, "shape": [2], "data_offsets": offsets}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    return path


def test_damaged_and_unknown_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        load_checkpoint(tmp_path, None)  # type: ignore
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="not a safetensors file, or truncated"):
        read_safetensors(path)
    with pytest.raises(ValueError, match="tensor 'w' has type F8_E4M3"):
        read_safetensors(_file(path, "F8_E4M3", [0, 2]))
    with pytest.raises(ValueError, match="truncated, tensor 'w' ends beyond"):
        read_safetensors(_file(path, "F32", [4, 12]))
    assert read_safetensors(_file(path, "F32", [0, 8]))["w"].tolist() == [0, 0]
