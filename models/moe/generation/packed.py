"""Parameters kept in a file as they lie in memory, which later starts map instead of reading.

A mapped parameter is a page of the file: nothing is read before a step touches it, all processes
that generate from the file share one copy, and the system may drop what is not in use. The file is
one of safetensors with each parameter, of all ranks, at a multiple of 64 bytes; what it was made
from stands in its header. It holds when that is as it was, and is made anew when not.

A checksum of every parameter stands at its end. To check them at every start would be to read the
whole file, so it is sealed with a time of change that has passed: who writes into it, or copies it,
breaks the seal, and the next start checks the values and seals it again.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import stat
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cmjax.console import Progress
from cmjax.cores import usable_cores
from cmjax.files import check_writable
from cmjax.inputs import map_bytes
from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.checkpoint.load import Checkpoint
from cmjax.models.moe.checkpoint.safetensor_file import (
    ALIGNMENT,
    StoredTensor,
    TensorSpec,
    bytes_of,
    read_header,
    write_tensors,
)
from cmjax.models.moe.slots import SlotTable
from cmjax.processes import is_first
from cmjax.version import __version__

_MARK = "cmjax packed weights"
_LAYOUT = 2
"""Of what parameters mean; raised whenever a format packs its values in another way."""
_PADDING = "padding."
_CHECKSUMS = "checksums"  # the last tensor: of each parameter, in their order


def packed_params(
    path: str | Path,
    shapes: Any,
    identity: str,
    make: Callable[[], Any],
    progress: Progress | None = None,
) -> tuple[Any, bool]:
    """Parameters mapped from a file, which is written first where it is not there or not of these.

    Where it cannot be written (a full disk; several processes, which hold a part each) a warning
    says so, and parameters are those that were made.

    Args:
      path: of the file.
      shapes: a pytree of `jax.ShapeDtypeStruct` with shardings.
      identity: of what they are made from (`identity_of`).
      make: gives them.
      progress: called with the bytes written or checked so far, in all, and which it is.
    Returns: arrays like `shapes`, and whether they are mapped.
    Raises:
      ValueError: a file that is none of packed weights (it is left as it is) or is damaged, or a
        place where none can be written.
    """
    path = Path(path)
    mapped = _mapped(path, shapes, identity, progress)
    if mapped is not None:
        return mapped, True
    check_writable(path)
    params = make()
    if jax.process_count() > 1:
        if is_first():
            warnings.warn(
                f"{path}: not written by several processes, which hold a part of the weights each; "
                "run once in a single process with the same mesh, and all of them map it",
                stacklevel=2,
            )
        return params, False
    try:
        _write(path, params, identity, progress)
    except OSError as error:
        warnings.warn(f"{path}: packed weights are not kept: {error.strerror}", stacklevel=2)
        return params, False
    mapped = _mapped(path, shapes, identity, progress)
    if mapped is None:  # another process has put its own there
        return params, False
    return mapped, True


def identity_of(
    checkpoint: Checkpoint, arithmetic: Arithmetic, tables: Sequence[SlotTable], shapes: Any
) -> str:
    """What parameters follow from, as a digest: the names, sizes and times of a checkpoint's files,
    the formats of weights, where experts live, the shapes, and the library's version."""
    files = {tensor.path for tensor in checkpoint.tensors.values()}
    found = [(p.name, p.stat()) for p in sorted({checkpoint.folder / "config.json", *files})]
    formats = dataclasses.asdict(arithmetic)
    for name in ("kv_cache", "attention"):  # no weight depends on them
        del formats[name]
    parts = [
        (_LAYOUT, __version__),
        [(name, about.st_size, about.st_mtime_ns) for name, about in found],
        sorted(formats.items()),
        [(table.ranks, table.experts_of_slot) for table in tables],
        [(name, leaf.shape, str(leaf.dtype)) for name, leaf in _named(shapes)],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _mapped(path: Path, shapes: Any, identity: str, progress: Progress | None) -> Any | None:
    """The arrays of a file, or nothing where it is absent or of something else."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # absent; or `check_writable` says what is wrong with the place
        return None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: packed weights are kept in a regular file; give another name")
    try:
        with path.open("rb") as file:
            tensors, about = read_header(file, path)
            if not isinstance(about, dict) or about.get("format") != _MARK:
                raise ValueError(f"{path}: tensors of another kind")
            if about.get("identity") != identity:
                return None
            data, changed_ns = map_bytes(file, path), os.fstat(file.fileno()).st_mtime_ns
    except (OSError, ValueError) as error:
        said = (
            error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{path}: ")
        )
        raise ValueError(
            f"{path}: no file of packed weights ({said}); give another name, or remove it to have "
            "it made"
        ) from None

    def array(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = _values(data, _stored(path, tensors, name, leaf.shape, leaf.dtype))
        assert leaf.sharding is not None, "placed_shapes gives one"
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda at: values[at])

    named = _named(shapes)
    leaves = [array(name, leaf) for name, leaf in named]
    seal_s = str(about.get("seal_s"))
    if seal_s != str(changed_ns / 1e9):
        _check_values(path, data, tensors, [name for name, _ in named], progress)
        _seal(path, seal_s)
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _seal(path: Path, seal_s: str) -> None:
    """Have the file last changed at a time; where it may not be, each start checks its values."""
    with contextlib.suppress(OSError, ValueError, OverflowError):  # another's; no such time
        os.utime(path, (float(seal_s), float(seal_s)))


def _check_values(
    path: Path,
    data: np.ndarray,
    tensors: Mapping[str, StoredTensor],
    names: Sequence[str],
    progress: Progress | None,
) -> None:
    """Read all parameters, on all cores, and hold them against their checksums.

    Raises: ValueError: names the first that is not as it was written.
    """
    sums = _values(data, _stored(path, tensors, _CHECKSUMS, (len(names),), np.dtype(np.int64)))
    done, total = 0, sum(tensors[name].nbytes for name in names)
    with ThreadPoolExecutor(len(usable_cores())) as pool:
        found = pool.map(lambda name: _checksum(name, _values(data, tensors[name])), names)
        for name, its, written in zip(names, found, sums, strict=True):
            if its != written:
                pool.shutdown(wait=False, cancel_futures=True)
                raise ValueError(
                    f"{path}: damaged: the values of {name!r} are not those that were written; "
                    "remove the file to have it made anew"
                )
            done += tensors[name].nbytes
            if progress is not None:
                progress(done, total, "checking packed weights")


def _checksum(name: str, values: np.ndarray) -> int:
    return zlib.crc32(bytes_of(values), zlib.crc32(name.encode()))


def _stored(
    path: Path, tensors: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...], dtype: Any
) -> StoredTensor:
    stored = tensors.get(name)
    if stored is None or (stored.shape, stored.dtype) != (shape, dtype):
        raise ValueError(
            f"{path}: damaged: no {name!r} of type {dtype} and shape {list(shape)}; remove the "
            "file to have it made anew"
        )
    return stored


def _values(data: np.ndarray, stored: StoredTensor) -> np.ndarray:
    """A tensor of a mapped file, not copied."""
    own = data[stored.offset : stored.offset + stored.nbytes]
    return own.view(stored.dtype).reshape(stored.shape)


def _write(path: Path, params: Any, identity: str, progress: Progress | None) -> None:
    arrays = dict(_named(params))
    kept = {name: TensorSpec(x.dtype, x.shape) for name, x in arrays.items()}
    kept[_CHECKSUMS] = TensorSpec(np.int64, (len(arrays),))
    specs, end = dict[str, TensorSpec](), 0
    for number, (name, spec) in enumerate(kept.items()):
        if gap := -end % ALIGNMENT:
            specs[f"{_PADDING}{number}"] = TensorSpec(np.uint8, (gap,))
        specs[name] = spec
        end += gap + spec.nbytes

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        done, sums = 0, list[int]()
        for name, spec in specs.items():
            if name in arrays:
                values = np.asarray(arrays[name])
                sums.append(_checksum(name, values))
            else:
                values = np.array(sums) if name == _CHECKSUMS else np.zeros(spec.shape, np.uint8)
            yield name, values
            done += spec.nbytes
            if progress is not None:
                progress(done, end, "packing")

    # An even second, which every file system keeps, and passed, so that no later change has it.
    seal_s = str(float(int(time.time()) // 2 * 2 - 2))
    about = {"format": _MARK, "identity": identity, "seal_s": seal_s}
    write_tensors(path, specs, tensors(), about)
    _seal(path, seal_s)


def _named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of nested dictionaries and tuples, and a name of each."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(at, simple=True, separator="."), leaf) for at, leaf in leaves]
