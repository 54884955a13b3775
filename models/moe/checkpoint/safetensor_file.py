"""Safetensors files, one tensor at a time.

A file is 8 bytes of header length, a JSON header (name -> dtype, shape, offsets), and the tensors'
bytes. Reading goes into a buffer of one tensor: neither the whole file nor a
map of it ever counts as this process's memory. The format's own library reads NumPy arrays through
a map and knows no FP8 in NumPy; the tests compare with it.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

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
        """The tensor, in memory of its own.

        Raises:
          ValueError: the file ends early; names it.
        """
        buffer = np.empty(self.nbytes, np.uint8)
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
      ValueError: not a safetensors file, truncated, or a type this reader does not know; names
        file, tensor and sizes.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, _MOST_HEADER_BYTES):
                raise ValueError(f"{path}: not a safetensors file, or truncated ({size:,} bytes)")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path}: not a safetensors file (its header is no JSON)") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: tensor {name!r} has type {entry['dtype']}; this reader knows "
                f"{', '.join(DTYPES)}"
            )
        start, end = entry["data_offsets"]
        tensor = StoredTensor(
            path, name, np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]), 8 + length + start
        )
        if end - start != tensor.nbytes:
            raise ValueError(
                f"{path}: tensor {name!r} of shape {list(tensor.shape)} and type {entry['dtype']} "
                f"takes {tensor.nbytes:,} bytes, its header says {end - start:,}"
            )
        if 8 + length + end > size:
            raise ValueError(
                f"{path}: truncated: tensor {name!r} ends at byte {8 + length + end:,}, the file "
                f"has {size:,}"
            )
        tensors[name] = tensor
    return tensors


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
) -> None:
    """Write one file; `tensors` come in the order of `specs` and are not kept.

    The file appears under its name when it is whole.
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
    text = json.dumps({"__metadata__": {"format": "pt"}} | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, spec), (given, tensor) in zip(specs.items(), tensors, strict=True):
            if name != given or tensor.shape != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(
                    f"write_tensors: expected {name!r} as {np.dtype(spec.dtype)}{list(spec.shape)},"
                    f" got {given!r} as {tensor.dtype}{list(tensor.shape)}"
                )
            file.write(np.ascontiguousarray(tensor).view(np.uint8).reshape(-1).data)
    os.replace(partial, path)
