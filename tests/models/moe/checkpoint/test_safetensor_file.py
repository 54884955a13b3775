"""Safetensors files: as the format's own library reads and writes them, and what is refused."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cmjax.models.moe.checkpoint.safetensor_file import TensorSpec, list_tensors, write_tensors

RNG = np.random.default_rng(0)
TENSORS = {
    "half": RNG.normal(size=(3, 5)).astype(np.float16),
    "single": RNG.normal(size=(4,)).astype(np.float32),
    "brain": RNG.normal(size=(2, 3, 2)).astype(ml_dtypes.bfloat16),
    "numbers": np.arange(6, dtype=np.int64).reshape(2, 3),
    "nothing": np.zeros((0, 7), np.float32),
    "scalar": np.array(3, np.float32),
}


def _equal(got, want):
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(got[name], tensor)


def test_tensors_equal_those_the_library_wrote(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    stored = list_tensors(tmp_path / "a.safetensors")
    _equal({name: tensor.read() for name, tensor in stored.items()}, TENSORS)


def test_the_library_reads_what_was_written(tmp_path):
    specs = {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()}
    write_tensors(tmp_path / "a.safetensors", specs, iter(TENSORS.items()))
    _equal(load_file(tmp_path / "a.safetensors"), TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_fp8_values_survive(tmp_path):
    values = np.array([0.0, 1.0, -448.0, 0.0625], ml_dtypes.float8_e4m3fn)
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"w": TensorSpec(values.dtype, (4,))}, [("w", values)])
    assert list_tensors(path)["w"].read().astype(np.float32).tolist() == [0, 1, -448, 0.0625]


def test_a_tensor_that_is_not_the_announced_one_leaves_no_file(tmp_path):
    specs = {"w": TensorSpec(np.float32, (2,))}
    with pytest.raises(ValueError, match=r"expected 'w' as float32\[2\], got 'w' as float32\[3\]"):
        write_tensors(tmp_path / "a.safetensors", specs, [("w", np.zeros(3, np.float32))])
    assert not (tmp_path / "a.safetensors").exists()


def _file(path, dtype, offsets, shape=(2,), content=8):
    mapping = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
    header = json.dumps({"w": mapping}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(content))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Q4_K", [0, 8]), "tensor 'w' has type Q4_K; this reader knows F64, F32"),
        (("F32", [4, 12]), "truncated: tensor 'w' ends at byte 8[0-9], the file has"),
        (("F32", [0, 4]), r"'w' of shape \[2\] and type F32 takes 8 bytes, its header says 4"),
    ],
)
def test_damaged_tensors_are_named_with_their_sizes(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        list_tensors(_file(tmp_path / "a.safetensors", *arguments))


@pytest.mark.parametrize("content", [b"\xff" * 20, b"", b"\x05" + bytes(7) + b"hello"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file"):
        list_tensors(path)
    with pytest.raises(ValueError, match="cannot be read"):
        list_tensors(tmp_path / "absent.safetensors")


def test_a_file_cut_after_its_header_was_read_is_noticed(tmp_path):
    path = _file(tmp_path / "a.safetensors", "F32", [0, 8])
    tensor = list_tensors(path)["w"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="truncated while reading tensor 'w'"):
        tensor.read()


def _raw(path, header, content=16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(content))
    return path


def _at(*offsets, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": _at(0, 8), "b": _at(4, 12)}, "'b' begins at byte .* neither overlap nor leave gaps"),
        ({"a": _at(0, 8), "b": _at(0, 8)}, "'b' begins at byte .* neither overlap nor leave gaps"),
        ({"a": _at(8, 16)}, "'a' begins at byte .*, but the header ends at"),
        ({"a": _at(0, 8)}, "tensor 'a' ends at byte .*, the file has"),
        ({"a": _at(-8, 0)}, r"'data_offsets\[0\]' must be at least 0, got -8"),
        ({"a": _at(8, 0)}, "takes 8 bytes, its header says -8"),
        ({"a": _at(0, 2**70)}, "'data_offsets.1.' must be"),
        ({"a": _at(0, 8, shape=(-1, -2))}, r"'shape\[0\]' must be at least 0, got -1"),
        ({"a": _at(0, 8, shape=(2.0,))}, r"'shape\[0\]' must be a whole number, got 2.0"),
        ({"a": _at(0, 8, shape=(2**40, 2**40))}, "takes .* bytes, its header says 8"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "tensor 'a': key 'data_offsets' is missing"),
        ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "tensor 'a': key 'dtype' is missing"),
        ({"a": _at(0, 8, 16)}, "tensor 'a': key 'data_offsets' must"),
        ({"a": _at(0, 8, dtype=None)}, "tensor 'a': key 'dtype' must be a string, got None"),
        ({"a": 3}, "tensor 'a': must be an object, got 3"),
        (b"[1]", "header is no JSON object"),
        (b"[" * 100_000, "its header: not valid JSON"),
        (b'{"a": {}, "a": {}}', "named twice: a"),
    ],
)
def test_a_header_that_lies_is_refused_in_one_line(tmp_path, header, message):
    with pytest.raises(ValueError, match=message) as error:
        list_tensors(_raw(tmp_path / "a.safetensors", header))
    assert "a.safetensors: " in str(error.value)


def test_what_the_library_refuses_is_refused(tmp_path):
    for number, header in enumerate(
        [{"a": _at(0, 8), "b": _at(4, 12)}, {"a": _at(8, 16)}, {"a": _at(0, 8)}]
    ):
        path = _raw(tmp_path / f"{number}.safetensors", header)
        with pytest.raises(SafetensorError):
            load_file(path)
        with pytest.raises(ValueError):
            list_tensors(path)
