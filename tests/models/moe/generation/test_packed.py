"""Weights kept in a file: mapped, the same to the bit, never stale, never half of one."""

import contextlib
import gc
import json
import os
import re
import resource
import shutil
import signal
import struct
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from cmjax.cli import main
from cmjax.inputs import map_bytes
from cmjax.mesh import RankMesh
from cmjax.models import moe
from cmjax.models.moe.checkpoint.safetensor_file import ALIGNMENT, list_tensors
from cmjax.models.moe.generation.open import GeneratorOptions
from tests.together import run_together

CONFIG = moe.tiny()
PROMPTS = [[1, 2, 3, 4, 5], [7]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    moe.save(moe.from_config(CONFIG, mtp=True), folder)
    return folder


def _open(folder, packed=None, arithmetic="float32", mesh=None):
    options = GeneratorOptions(packed=packed, arithmetic=arithmetic)
    return moe.open_generator(folder, mesh, options)


def _equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (x.dtype, x.sharding) == (y.dtype, y.sharding)
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def _lies_in(array, path):
    """Whether every shard of an array lies in a mapping of a file, as Linux lists them."""
    ranges = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if re.search(rf" {re.escape(str(path))}( \(deleted\))?$", line)
    ]
    places = [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]
    return all(any(first <= place < end for first, end in ranges) for place in places)


def _forget_values(folder, stat):
    """Zeros in place of a checkpoint's values, in a file of the same size and time."""
    path = folder / "model.safetensors"
    start = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(stat.st_size - start))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, RankMesh(1, 4), RankMesh(2, 2)], ids=str)
@pytest.mark.parametrize("arithmetic", ["float32", "int8", "msd_w8a16_head8", "w4a8"])
def test_mapped_weights_are_those_that_are_read(checkpoint, tmp_path, arithmetic, mesh):
    plain = _open(checkpoint, None, arithmetic, mesh)
    for _ in range(2):  # written, then found
        kept = _open(checkpoint, tmp_path / "kept", arithmetic, mesh)
        _equal(kept.params, plain.params)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    for tensor in list_tensors(tmp_path / "kept").values():
        assert tensor.offset % ALIGNMENT == 0 or tensor.name.startswith("padding.")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize("mesh", [None, RankMesh(2, 2)], ids=str)
def test_a_later_start_reads_no_checkpoint_and_copies_nothing(tmp_path, mesh):
    moe.save(moe.from_config(CONFIG, mtp=True), tmp_path)
    before = (tmp_path / "model.safetensors").stat()
    kept = tmp_path / "kept"
    wanted = jax.tree.map(np.array, _open(tmp_path, kept, "msd_w8a16", mesh).params)
    _forget_values(tmp_path, before)
    found = _open(tmp_path, kept, "msd_w8a16", mesh).params
    assert all(_lies_in(leaf, kept) for leaf in jax.tree.leaves(found))
    kept.unlink()  # what is mapped stays
    gc.collect()
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.slow
def test_tokens_are_those_of_weights_that_are_read(checkpoint, tmp_path):
    wanted = _open(checkpoint).generate(PROMPTS, 6)
    for _ in range(2):
        found = _open(checkpoint, tmp_path / "kept").generate(PROMPTS, 6)
        assert found.completions == wanted.completions
        assert found.accepted == wanted.accepted


@pytest.mark.slow
def test_a_changed_checkpoint_another_format_and_other_places_make_the_file_anew(tmp_path):
    folder, kept = tmp_path / "checkpoint", tmp_path / "kept"
    folder.mkdir()
    moe.save(moe.from_config(CONFIG, mtp=True), folder)
    _open(folder, kept)
    for change in "weights", "arithmetic", "mesh", "drafts":
        arithmetic = "float32" if change == "weights" else "bfloat16"
        mesh = RankMesh(1, 4) if change in ("mesh", "drafts") else None
        if change == "weights":  # of the same size
            for path in folder.iterdir():
                path.unlink()
            moe.save(moe.from_config(CONFIG, mtp=True, seed=1), folder)
        drafts = 0 if change == "drafts" else None
        options = GeneratorOptions(packed=kept, arithmetic=arithmetic, drafts=drafts)
        before = kept.stat().st_ino
        found = moe.open_generator(folder, mesh, options).params
        assert kept.stat().st_ino != before, change
        plain = GeneratorOptions(arithmetic=arithmetic, drafts=drafts)
        _equal(found, moe.open_generator(folder, mesh, plain).params)


def test_the_cache_and_attention_do_not_make_the_file_anew(checkpoint, tmp_path):
    kept = tmp_path / "kept"
    _open(checkpoint, kept, "bfloat16")
    before = kept.stat()
    _open(checkpoint, kept, "pasa_fp16")
    options = GeneratorOptions(packed=kept, arithmetic="bfloat16", kv_cache="int8")
    moe.open_generator(checkpoint, options=options)
    assert kept.stat().st_ino == before.st_ino


@contextlib.contextmanager
def _files_of_at_most(size):
    """As a full disk: a write beyond it is an error."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_nothing_and_breaks_nothing(checkpoint, tmp_path):
    plain = _open(checkpoint)
    with (
        _files_of_at_most(100_000),
        pytest.warns(UserWarning, match=r"kept: packed weights are not kept: File too large"),
    ):
        found = _open(checkpoint, tmp_path / "kept")
    _equal(found.params, plain.params)
    assert not list(tmp_path.iterdir())


def test_a_write_that_is_cut_off_leaves_the_file_that_was_there(checkpoint, tmp_path):
    kept = tmp_path / "kept"
    _open(checkpoint, kept, "bfloat16")
    before = kept.read_bytes()
    with _files_of_at_most(100_000), pytest.warns(UserWarning, match="not kept"):
        _open(checkpoint, kept, "int8")
    assert kept.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["kept"]


def _another_shape(data):
    """A packed file with the first of its vectors said to be a matrix of one row."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    entry = next(x for x in header.values() if len(x.get("shape", ())) == 1)
    entry["shape"] = [1, *entry["shape"]]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def _flipped(data):
    """One bit of the last parameter's last value, before the checksums."""
    tensors = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    last = [x for name, x in tensors.items() if not name.startswith(("padding.", "checksums"))][-1]
    at = 8 + struct.unpack("<Q", data[:8])[0] + last["data_offsets"][1] - 1
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def _other_checksum(data):
    return data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flipped, r"kept: damaged: the values of 'mtp\.\S*' are not those that were written"),
        (_other_checksum, r"kept: damaged: the values of 'mtp\.\S*' are not those that were"),
        (lambda data: data[:-1], "kept: no file of packed weights .truncated: tensor .* the file"),
        (lambda data: data[:100], "kept: no file of packed weights .not a safetensors file"),
        (lambda data: b"", "kept: no file of packed weights .not a safetensors file"),
        (lambda data: data + b"\0", "kept: no file of packed weights .*the file has"),
        (lambda data: b"a letter to a friend", "kept: no file of packed weights"),
        (_another_shape, "kept: damaged: no '.*' of type float32 and shape"),
    ],
)
def test_a_damaged_file_is_one_line_and_stays(checkpoint, tmp_path, capsys, damage, message):
    kept = tmp_path / "kept"
    _open(checkpoint, kept)
    kept.write_bytes(damaged := damage(kept.read_bytes()))
    options = ["--weights", str(checkpoint), "--prompt-tokens", "1", "--packed", str(kept)]
    assert main(["generate", *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert re.search(message, line), line
    assert kept.read_bytes() == damaged


@pytest.mark.slow
def test_values_are_checked_once_after_each_change(checkpoint, tmp_path):
    kept, told = tmp_path / "kept", []
    plain = _open(checkpoint)
    options = GeneratorOptions(packed=kept)

    def start():
        told.clear()
        progress = lambda done, total, what: told.append((done, total, what))  # noqa: E731
        _equal(
            moe.open_generator(checkpoint, None, options, progress=progress).params, plain.params
        )
        return [entry for entry in told if entry[2] == "checking packed weights"]

    assert not start() and not start()  # written, then mapped
    kept.touch()
    checked = start()
    assert checked[-1][0] == checked[-1][1] == sum(x.nbytes for x in jax.tree.leaves(plain.params))
    assert not start()
    shutil.copyfile(kept, tmp_path / "copy")
    options = GeneratorOptions(packed=tmp_path / "copy")
    assert start() and not start()


def test_a_copy_that_may_not_be_sealed_is_checked_at_every_start(checkpoint, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    _open(checkpoint, kept)
    kept.touch()
    monkeypatch.setattr("cmjax.models.moe.generation.packed.os.utime", _refused)
    plain = _open(checkpoint)
    _equal(_open(checkpoint, kept).params, plain.params)
    kept.write_bytes(_flipped(kept.read_bytes()))
    with pytest.raises(ValueError, match="damaged"):
        _open(checkpoint, kept)


def _refused(*_, **__):
    raise PermissionError(1, "Operation not permitted")


def test_a_file_of_something_else_is_never_written_over(checkpoint):
    file = checkpoint / "model.safetensors"
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"no file of packed .*\(tensors of another kind\)"):
        _open(checkpoint, file)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (".", "packed weights are kept in a regular file"),
        ("/dev/null", "/dev/null: packed weights are kept in a regular file"),
        ("no/such/kept", "the folder .*no/such does not exist"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_place_where_no_file_can_be_is_refused_before_a_weight_is_read(
    checkpoint, tmp_path, monkeypatch, place, message
):
    monkeypatch.setattr("cmjax.models.moe.generation.open.load_params", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match=message):
        _open(checkpoint, tmp_path / place)


def test_random_parameters_are_not_kept(tmp_path):
    with pytest.raises(ValueError, match=r"packed .*kept: a file keeps the weights"):
        moe.open_generator(CONFIG, options=GeneratorOptions(packed=tmp_path / "kept"))


@pytest.mark.slow
def test_several_processes_map_what_one_wrote(checkpoint, tmp_path, capsys):
    kept = tmp_path / "kept"
    options = ["--weights", str(checkpoint), "--prompt-tokens", "1,2,3", "--prompt-tokens", "4,5"]
    options += ["--new-tokens", "3", "--mesh", "2x1", "--json", "-", "--packed", str(kept)]
    first, _ = run_together("cmjax", ["generate", *options])
    assert not kept.exists()
    assert main(["generate", *options]) == 0
    alone = json.loads(capsys.readouterr().out)["requests"]
    before = kept.stat()
    again, _ = run_together("cmjax", ["generate", *options])
    assert json.loads(first)["requests"] == json.loads(again)["requests"] == alone
    assert kept.stat().st_ino == before.st_ino


def test_what_is_mapped_outlives_its_file_and_cannot_be_written(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    with path.open("rb") as file:
        data = map_bytes(file, path)
    path.unlink()
    assert data.tobytes() == b"abc" and not data.flags.writeable


def test_an_empty_file_is_not_mapped(tmp_path):
    path = tmp_path / "a"
    path.touch()
    with path.open("rb") as file, pytest.raises(ValueError, match=r"a: cannot be mapped: .*empty"):
        map_bytes(file, path)
