"""NumPy's `.npy` and `.npz`: what a header asks for is held against the file before it is made."""

import io
import math
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from cmjax.inputs.text import in_one_line

MOST_BYTES = 4 * 2**30
"""Of all arrays of a file, unpacked."""
_INFLATED, _RATIO = 256 * 2**20, 200
"""An archive's entry that inflates to more than so many bytes, and so many times, is a bomb."""
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_BROKEN = (
    ValueError, TypeError, KeyError, EOFError, OSError, SyntaxError, RecursionError, MemoryError,
    OverflowError, NotImplementedError, RuntimeError, tokenize.TokenError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What NumPy and zipfile raise for files that are none."""


def read_array(path: str | Path) -> np.ndarray:
    """The array of a `.npy` file.

    Raises: ValueError: it cannot be read, is damaged, holds objects, or asks for more than it has.
    """
    try:
        with Path(path).open("rb") as file:
            return _array(file, file.seek(0, io.SEEK_END))
    except _BROKEN as error:
        raise ValueError(f"{path}: expected a numeric .npy array, found: {_said(error)}") from None


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of an `.npz` archive by name.

    Raises: ValueError: it cannot be read, is damaged, or inflates to more than is read.
    """
    try:
        with Path(path).open("rb") as file:
            if file.read(6) == b"\x93NUMPY":
                raise ValueError("a single .npy array")
            with zipfile.ZipFile(file) as archive:
                names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
                if len(set(names)) < len(names):
                    raise ValueError("arrays of the same name")
                check_archive(archive)
                members = zip(names, archive.infolist(), strict=True)
                return {name: read_member(archive, info) for name, info in members}
    except _BROKEN as error:
        raise ValueError(
            f"{path}: expected an .npz of numeric arrays, found: {_said(error)}"
        ) from None


def check_archive(archive: zipfile.ZipFile) -> None:
    """Is what a zip archive inflates to within bounds?

    Raises: ValueError: a zip bomb, an encrypted entry, or one packed in another way than NumPy's.
    """
    total = 0
    for info in archive.infolist():
        if info.flag_bits & 1:
            raise ValueError(f"{info.filename} is encrypted")
        if info.compress_type not in _PACKED:
            raise ValueError(
                f"{info.filename} is packed by the unknown method {info.compress_type}"
            )
        if info.file_size > max(_INFLATED, _RATIO * info.compress_size):
            raise ValueError(
                f"{info.filename} inflates from {info.compress_size:,} to {info.file_size:,} bytes"
            )
        total += info.file_size
    if total > MOST_BYTES:
        raise ValueError(f"{total:,} bytes of arrays; at most {MOST_BYTES:,} are read")


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One array of an archive that `check_archive` has let pass.

    Raises: ValueError, and what zipfile raises: damaged, or its header asks for more than it has.
    """
    with archive.open(info) as file:
        return _array(file, info.file_size)


def _array(file: IO[bytes], nbytes: int) -> np.ndarray:
    """The array of an open file of so many bytes, which is at most what its header asks for."""
    file.seek(0)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version[0]}.{version[1]} of the format")
    if dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"{dtype} data, which only pickle reads")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"the shape {shape}")
    needed, there = math.prod(shape) * dtype.itemsize, nbytes - file.tell()
    if needed > there:
        raise ValueError(f"the shape {shape} of {dtype}, {needed:,} bytes, in {max(there, 0):,}")
    if needed > MOST_BYTES:
        raise ValueError(f"{needed:,} bytes; at most {MOST_BYTES:,} are read")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _said(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return in_one_line(error)
