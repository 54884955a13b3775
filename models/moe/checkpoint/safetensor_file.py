"""Safetensors files, one tensor at a time.

A file is 8 bytes of header length, a JSON header (name -> dtype, shape, offsets), and the tensors'
bytes. Reading goes into a buffer of one tensor: neither the whole file nor a map of it
ever counts as this process's memory. A map of a published checkpoint would save nothing: matrices
are transposed or rounded on their way to the model, and lie unaligned, so that JAX would copy them
first (`cmjax.models.moe.generation.packed` maps what is aligned). The format's own library reads
NumPy arrays through a map and knows no FP8 in NumPy; the tests compare with it.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple

import ml_dtypes
import msgspec
import numpy as np

from cmjax.files import replaced
from cmjax.inputs import parse_json
from cmjax.models.moe.checkpoint.json_file import convert

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit
ALIGNMENT = 64
"""JAX takes an array of the host that lies at a multiple as it is, and copies any other."""
_Offset = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    path: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor, in memory of its own, which `jax.device_put` shares on CPU devices.

        Raises:
          ValueError: the file ends early; names it.
        """
        buffer = np.empty(self.nbytes + ALIGNMENT, np.uint8)
        buffer = buffer[-buffer.ctypes.data % ALIGNMENT :][: self.nbytes]
        view, done = memoryview(buffer), 0
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(f"{self.path}: truncated while reading tensor {self.name!r}")
                done += count
        return buffer.view(self.dtype).reshape(self.shape)


def list_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name; reads its header only.

    Raises:
      ValueError: not a safetensors file, truncated, tensors that overlap or leave gaps, or a type
        this reader does not know; names file, tensor and sizes.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return read_header(file, path).tensors
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


class Header(NamedTuple):
    """What a file says of itself."""

    tensors: dict[str, StoredTensor]
    metadata: Any  # a dictionary of texts, in a file of the format's own library; or nothing


def read_header(file: IO[bytes], path: Path) -> Header:
    """The header of an open file.

    Args: path: of the tensors, and in messages.
    Raises: ValueError: see `list_tensors`. OSError: it cannot be read.
    """
    header, start, size = _read_object(file, path)
    metadata = header.pop("__metadata__", None)
    tensors = {}
    for name, raw in header.items():
        entry = convert(raw, _Entry, path, f"tensor {name!r}")
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{path}: tensor {name!r} has type {entry.dtype}; this reader knows "
                f"{', '.join(DTYPES)}"
            )
        first, end = entry.data_offsets
        tensor = StoredTensor(
            path, name, np.dtype(DTYPES[entry.dtype]), tuple(entry.shape), start + first
        )
        if end - first != tensor.nbytes:
            raise ValueError(
                f"{path}: tensor {name!r} of shape {list(tensor.shape)} and type {entry.dtype} "
                f"takes {tensor.nbytes:,} bytes, its header says {end - first:,}"
            )
        if start + end > size:
            raise ValueError(
                f"{path}: truncated: tensor {name!r} ends at byte {start + end:,}, the file "
                f"has {size:,}"
            )
        tensors[name] = tensor
    _check_order(path, tensors, start, size)
    return Header(tensors, metadata)


class _Entry(msgspec.Struct):
    """What a header says of one tensor."""

    dtype: str
    shape: list[Annotated[int, msgspec.Meta(ge=0, le=2**48)]]
    data_offsets: tuple[_Offset, _Offset]


def _read_object(file: IO[bytes], path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's object, the byte after it, and the bytes of the file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(size - 8, _MOST_HEADER_BYTES):
        raise ValueError(f"{path}: not a safetensors file, or truncated ({size:,} bytes)")
    text = file.read(length)
    try:
        header = parse_json(text, "")
    except ValueError as error:
        raise ValueError(f"{path}: not a safetensors file (its header: {error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a safetensors file (its header is no JSON object)")
    return header, 8 + length, size


def _check_order(path: Path, tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    """Tensors fill the file from the header to its end, as the format's own library demands."""
    at, before = start, "the header"
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != at:
            raise ValueError(
                f"{path}: tensor {tensor.name!r} begins at byte {tensor.offset:,}, but {before} "
                f"ends at {at:,}: tensors must neither overlap nor leave gaps"
            )
        at, before = at + tensor.nbytes, f"tensor {tensor.name!r}"
    if at != size:
        raise ValueError(f"{path}: {before} ends at byte {at:,}, the file has {size:,}")


class TensorSpec(NamedTuple):
    """Type and shape of a tensor to be written."""

    dtype: Any
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_tensors(
    path: str | Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file; `tensors` come in the order of `specs` and are not kept.

    The file appears under its name when it is whole. The first tensor lies at a multiple of
    `ALIGNMENT`.

    Args: metadata: what else the header is to say.
    """
    path, header, offset = Path(path), {}, 0
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    for name, spec in specs.items():
        header[name] = {
            "dtype": names[np.dtype(spec.dtype)],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    about = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
    text = json.dumps(about | header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with replaced(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, spec), (given, tensor) in zip(specs.items(), tensors, strict=True):
            if name != given or tensor.shape != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(
                    f"write_tensors: expected {name!r} as {np.dtype(spec.dtype)}{list(spec.shape)},"
                    f" got {given!r} as {tensor.dtype}{list(tensor.shape)}"
                )
            file.write(bytes_of(tensor))


def bytes_of(tensor: np.ndarray) -> memoryview:
    """A tensor's bytes as a file holds them."""
    return np.ascontiguousarray(tensor).view(np.uint8).reshape(-1).data
