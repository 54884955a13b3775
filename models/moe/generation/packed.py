"""Parameters kept in a file as they lie in memory, which later starts map instead of reading.

A mapped parameter is a page of the file: nothing is read before a step touches it, all processes
that generate from the file share one copy, and the system may drop what is not in use. The file is
one of safetensors with each parameter, of all ranks, at a multiple of 64 bytes; what it was made
from stands in its header. It holds when that is as it was, and is made anew when not.
"""

import dataclasses
import hashlib
import json
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cmjax.console import Progress
from cmjax.files import check_writable
from cmjax.inputs import map_bytes
from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.checkpoint.load import Checkpoint
from cmjax.models.moe.checkpoint.safetensor_file import (
    ALIGNMENT,
    StoredTensor,
    TensorSpec,
    read_header,
    write_tensors,
)
from cmjax.models.moe.slots import SlotTable
from cmjax.processes import is_first
from cmjax.version import __version__

_MARK = "cmjax packed weights"
_LAYOUT = 1
"""Of what parameters mean; raised whenever a format packs its values in another way."""
_PADDING = "padding."


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
      progress: called with the bytes written so far, in all, and what is being done.
    Returns: arrays like `shapes`, and whether they are mapped.
    Raises:
      ValueError: a file that is none of packed weights (it is left as it is) or is damaged, or a
        place where none can be written.
    """
    path = Path(path)
    mapped = _mapped(path, shapes, identity)
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
    mapped = _mapped(path, shapes, identity)  # None: another process has put its own there
    return (params, False) if mapped is None else (mapped, True)


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


def _mapped(path: Path, shapes: Any, identity: str) -> Any | None:
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
            data = map_bytes(file, path)
    except (OSError, ValueError) as error:
        said = (
            error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{path}: ")
        )
        raise ValueError(
            f"{path}: no file of packed weights ({said}); give another name, or remove it to have "
            "it made"
        ) from None

    def array(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        stored = tensors.get(name)
        if stored is None or (stored.shape, stored.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{path}: damaged: no {name!r} of type {leaf.dtype} and shape {list(leaf.shape)}; "
                "remove the file to have it made anew"
            )
        values = _values(data, stored)
        assert leaf.sharding is not None, "placed_shapes gives one"
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda at: values[at])

    leaves = [array(name, leaf) for name, leaf in _named(shapes)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _values(data: np.ndarray, stored: StoredTensor) -> np.ndarray:
    """A tensor of a mapped file, not copied."""
    own = data[stored.offset : stored.offset + stored.nbytes]
    return own.view(stored.dtype).reshape(stored.shape)


def _write(path: Path, params: Any, identity: str, progress: Progress | None) -> None:
    arrays, specs, end = dict(_named(params)), {}, 0
    for number, (name, x) in enumerate(arrays.items()):
        if end % ALIGNMENT:
            gap = -end % ALIGNMENT
            specs[f"{_PADDING}{number}"] = TensorSpec(np.uint8, (gap,))
            end += gap
        specs[name] = TensorSpec(x.dtype, x.shape)
        end += specs[name].nbytes
    total, done = end, 0

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal done
        for name, spec in specs.items():
            yield (
                name,
                np.asarray(arrays[name]) if name in arrays else np.zeros(spec.shape, np.uint8),
            )
            done += spec.nbytes
            if progress is not None:
                progress(done, total, "packing")

    write_tensors(path, specs, tensors(), {"format": _MARK, "identity": identity})


def _named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of nested dictionaries and tuples, and a name of each."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(at, simple=True, separator="."), leaf) for at, leaf in leaves]
