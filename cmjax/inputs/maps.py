"""Files mapped into memory: read where they are touched, and shared by all who map them."""

import contextlib
import mmap
from pathlib import Path
from typing import IO

import numpy as np


def map_bytes(file: IO[bytes], path: str | Path) -> np.ndarray:
    """The bytes of an open file as uint8, read-only and not copied.

    They stay when it is closed, replaced or removed; one that is cut short while it is mapped ends
    the process. They lie in huge pages where the file system has large folios (ext4 from Linux 6.16
    on, say).

    Args: path: what messages call it.
    Raises: ValueError: it is empty, no regular file, or cannot be mapped.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(b"abc") and file.flush()
    ...     map_bytes(file, file.name).tolist()
    [97, 98, 99]
    """
    try:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"{path}: cannot be mapped: {said}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        with contextlib.suppress(OSError):  # of a system without huge pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, np.uint8)
