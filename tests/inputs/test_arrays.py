"""Arrays of files: a header is believed only as far as the file goes."""

import io
import json
import resource
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from cmjax.inputs import read_array, read_arrays
from cmjax.placement import read_loads, read_plan

MIB = 2**20


def _npy(shape, dtype="<f8", data=b"", version=(1, 0)):
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    write = np.lib.format.write_array_header_1_0 if version == (1, 0) else (
        np.lib.format.write_array_header_2_0
    )  # fmt: skip
    write(file, header)
    return file.getvalue() + data


def test_arrays_come_back_as_numpy_wrote_them(tmp_path):
    arrays = {"a": np.arange(6).reshape(2, 3).T, "b": np.array(["x", "yz"]), "c": np.float32(3)}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    found = read_arrays(tmp_path / "a.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    for version in ((1, 0), (2, 0)):
        (tmp_path / "a.npy").write_bytes(_npy((2,), "<i8", bytes(16), version))
        np.testing.assert_array_equal(read_array(tmp_path / "a.npy"), [0, 0])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "expected a numeric"),
        (b"\x93NUMPY\x01\x00", "expected a numeric"),
        (_npy((2**40, 8)), "70,368,744,177,664 bytes"),
        (_npy((2**62, 2**62)), "bytes"),
        (_npy((3,), "<i8", bytes(16)), "24 bytes, in 16"),
        (_npy((1,), "|O", b"x"), "pickle"),
        (_npy((5,), "|V0"), "found"),
        (_npy((2,), "<i8", bytes(16)).replace(b"(2,)", b"-2, "), "expected a numeric"),
        (_npy((2,), "<i8", bytes(16)).replace(b"(2,)", b"((((") , "expected a numeric"),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_one_line(tmp_path, data, said):
    path = tmp_path / "a.npy"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"a.npy.*{said}") as caught:
        read_array(path)
    assert "\n" not in str(caught.value)


def _zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_a_zip_bomb_is_refused_before_it_is_inflated(tmp_path):
    path = tmp_path / "a.npz"
    header = _npy((4 * 2**30 // 8,))
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("counts.npy", "w", force_zip64=True) as file,
    ):
        file.write(header)
        for _ in range(300):
            file.write(bytes(MIB))
    assert path.stat().st_size < MIB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with pytest.raises(ValueError, match="inflates from"):
        read_loads(path)
    assert time.monotonic() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_entries_that_numpy_never_writes_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    _zip(path, {"a.npy": _npy((1,), "<i8", bytes(8))})
    whole = bytearray(path.read_bytes())
    for offset, value, said in ((6, 1, "encrypted"), (8, 99, "unknown method 99")):
        changed = whole.copy()
        at = changed.index(b"PK\x01\x02") + offset + 2
        changed[offset], changed[at] = value, value
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=said):
            read_arrays(path)
    _zip(path, {"a.npy": b"no array"})
    with pytest.raises(ValueError, match=r"a\.npz: expected an \.npz"):
        read_arrays(path)
    _zip(path, {"a.npy": _npy((1,), "<i8", bytes(8)), "a": _npy((1,), "<i8", bytes(8))})
    with pytest.raises(ValueError, match="same name"):
        read_arrays(path)


IDS = np.array([[[0, 1]], [[1, 2]], [[2, 3]], [[3, 0]]])


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"ids": IDS, "seq_lens": np.array([2**62] * 4 + [4])}, "seq_lens from 0 to 4"),
        ({"ids": IDS, "seq_lens": np.array([5, -1])}, "seq_lens from 0 to 4, found -1"),
        ({"ids": IDS, "seq_lens": np.array([[4]])}, "seq_lens as whole numbers in 1 dim"),
        ({"ids": IDS, "seq_lens": np.array([4.0])}, "seq_lens as whole numbers"),
        ({"ids": IDS, "seq_lens": np.array([1, 2])}, "sum to 4 tokens, found 3"),
        ({"ids": IDS, "doc": np.array([0.5, 1, 2, 3])}, "doc as whole numbers"),
        ({"ids": IDS, "doc": np.array(list("abcd"))}, "doc as whole numbers"),
        ({"ids": IDS * 2**40}, "experts must be at most"),
        ({"ids": np.array([[[0, 2**63]], [[1, 2]]], np.uint64)}, "experts must be at most"),
        ({"freq": np.ones((2, 1, 4)), "category": np.zeros(2)}, "names or numbers in category"),
    ],
)
def test_numbers_of_a_recording_are_checked_before_they_size_anything(tmp_path, arrays, said):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"a\.npz.*{said}"):
        read_loads(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "layer,expert,hits\n0,1e10,5\n", "experts must be at most"),
        ("a.csv", "layer,expert,hits\ninf,0,5\n", "whole numbers of 0 or more"),
        ("a.csv", "layer,expert,hits\n1e300,0,5\n", "whole numbers of 0 or more"),
        ("a.csv", "layer,expert,hits\nnan,0,5\n", "whole numbers of 0 or more"),
        ("a.csv", "layer_id,expert_id,count\n0,60000,1\n1e15,0,2\n", "layer's number"),
        ("a.json", '{"layers": [0, 1' + "0" * 400 + '], "counts": [[1], [2]]}', "layer's number"),
    ],
)  # fmt: skip
def test_numbers_of_a_table_are_checked_before_they_size_anything(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_loads(tmp_path / name)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"experts": 10**12}, "experts must be at most 65,536"),
        ({"experts": 10**400}, "experts must be at most"),
        ({"ranks": 10**12}, "do not divide over"),
        ({"expert_of_slot": [[0, [1, 2]]]}, "expected numbers in expert_of_slot"),
        ({"expert_of_slot": [[0, 10**30]]}, "expected"),
        ({"expert_of_slot": [[True, False]]}, "expected numbers"),
        ({"layer_labels": [10**9]}, "layer's number must be at most"),
    ],
)
def test_numbers_of_a_plan_are_checked_before_they_size_anything(tmp_path, changed, said):
    plan = {"format": "cmjax-placement", "version": 1, "experts": 2, "ranks": 1, "nodes": 1,
            "expert_of_slot": [[0, 1]]} | changed  # fmt: skip
    (tmp_path / "p.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=said):
        read_plan(tmp_path / "p.json")


def test_yaml_that_grows_as_it_is_walked_is_refused(tmp_path):
    lines = ["num_slots: 2", "a0: &a0 [0, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    lines += ["initial_global_assignments: {3: *a29}"]
    (tmp_path / "wide.yaml").write_text("\n".join(lines))
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 5000)
    code = "import sys; from cmjax.placement import read_plan; read_plan(sys.argv[1], ranks=1)"
    for name, said in (("wide", "expected numbers"), ("deep", "expected a plan as YAML")):
        path = str(tmp_path / f"{name}.yaml")  # a process of its own: tests walk all arguments
        ran = subprocess.run(
            [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=20
        )
        assert f"ValueError: {path}: {said}" in ran.stderr
