"""Checkpoint folders: which file a tensor is taken from, and folders that contradict themselves."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from cmjax.models.moe.checkpoint.folder import INDEX, list_folder

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _shard(folder, name, *tensors, value=1.0):
    save_file({tensor: np.full(2, value, np.float32) for tensor in tensors}, folder / name)


def _index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_stale_shards_beside_new_ones_are_named(tmp_path):
    _shard(tmp_path, ONE, "a", "b")
    _shard(tmp_path, "model-00001-of-00001.safetensors", "b", "c", value=2.0)
    with pytest.raises(ValueError, match=f"1 tensors are in model-00001-of-00001.* {ONE}: b"):
        list_folder(tmp_path)


def test_without_an_index_all_shards_are_read(tmp_path):
    _shard(tmp_path, ONE, "a")
    _shard(tmp_path, TWO, "b")
    found = list_folder(tmp_path)
    assert {name: tensor.path.name for name, tensor in found.items()} == {"a": ONE, "b": TWO}


def test_one_whole_file_is_read_alone(tmp_path):
    _shard(tmp_path, "model.safetensors", "a", value=3.0)
    _shard(tmp_path, ONE, "a")
    assert list_folder(tmp_path)["a"].read().tolist() == [3, 3]


def test_a_shard_that_no_index_names_is_not_read(tmp_path):
    _shard(tmp_path, ONE, "a", value=3.0)
    _shard(tmp_path, "old.safetensors", "a")
    _index(tmp_path, {"a": ONE})
    assert list_folder(tmp_path)["a"].read().tolist() == [3, 3]


def test_a_tensor_in_two_shards_of_an_index_is_refused(tmp_path):
    _shard(tmp_path, ONE, "a")
    _shard(tmp_path, TWO, "a", "b")
    _index(tmp_path, {"a": ONE, "b": TWO})
    with pytest.raises(ValueError, match=f"1 tensors are in {ONE} and in {TWO}: a"):
        list_folder(tmp_path)


def test_an_index_of_other_files_beside_a_whole_one_is_refused(tmp_path):
    _shard(tmp_path, "model.safetensors", "a")
    _shard(tmp_path, ONE, "a", value=2.0)
    _index(tmp_path, {"a": ONE})
    with pytest.raises(ValueError, match=r"holds a model.safetensors and a .*index.json of other"):
        list_folder(tmp_path)
    _index(tmp_path, {"a": "model.safetensors"})
    assert list_folder(tmp_path)["a"].read().tolist() == [1, 1]


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "a/../../x", "..\\x", "C:\\x", "", "a\0b"]
)
def test_an_index_may_not_point_outside_its_folder(tmp_path, file):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    _shard(tmp_path, "x.safetensors", "a")
    _index(folder, {"a": file})
    with pytest.raises(ValueError, match=r"index.json: .* is no file within this folder"):
        list_folder(folder)


def test_a_link_to_a_file_elsewhere_is_followed(tmp_path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    _shard(blobs, "0123", "a")
    (folder / ONE).symlink_to("../blobs/0123")  # as Hugging Face's cache lies
    _index(folder, {"a": ONE})
    assert list_folder(folder)["a"].read().tolist() == [1, 1]


@pytest.mark.parametrize(
    "text",
    [
        "{}", "[]", "null", "{", "\xff", '{"weight_map": null}', '{"weight_map": []}',
        '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": {"a": null}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_an_index_of_another_form_is_refused_in_one_line(tmp_path, text):
    _shard(tmp_path, ONE, "a")
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError) as error:
        list_folder(tmp_path)
    assert str(error.value).startswith(str(tmp_path / INDEX))
    assert "\n" not in str(error.value)


def test_a_name_that_no_file_system_takes_is_a_missing_shard(tmp_path):
    _index(tmp_path, {"a": "x" * 5000})
    with pytest.raises(ValueError, match=r"1 of 1 shards .* are missing"):
        list_folder(tmp_path)
