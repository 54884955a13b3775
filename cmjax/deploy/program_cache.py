"""Traced programs and what their prices compute, kept between runs in the user's cache folder.

They depend on the deployment, the machine's counts and the code, not on batch or context: the next
prediction of the same one, at any size, starts without the model and traces nothing. A file is
named by what it depends on, so that nothing is ever out of date. A file that cannot be read or
written is as good as none.
"""

import functools
import hashlib
import io
import os
import pickle
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jax

from cmjax.files import cache_folder, replace_bytes

_KEPT = 512
"""Most files in the folder; the least recently used go first."""
_TRUSTED = {
    ("builtins", "dict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
}
"""What a file may hold besides the project's own classes."""


def kept[Value](key: tuple, make: Callable[[], Value]) -> Value:
    """What `make()` gives, or gave in another run.

    Args:
      key: what the value depends on besides the code; its `repr` tells it from all others.
      make: called where nothing is kept; its value is one of the project's own objects.
    """
    path = _path(key)
    if path is None:
        return make()
    try:
        value = _Reader(io.BytesIO(path.read_bytes())).load()
        os.utime(path)
        return value
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, ValueError):
        value = make()
    try:
        replace_bytes(path, pickle.dumps(value))
        _forget_old(path.parent)
    except OSError:
        pass  # a full disk, say: the value is right all the same
    return value


class _Reader(pickle.Unpickler):
    """Makes the project's own objects and numbers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "cmjax" or (module, name) in _TRUSTED:
            found = super().find_class(module, name)
            if isinstance(found, type) or (module, name) in _TRUSTED:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is not expected in a traced program")


def _path(key: tuple) -> Path | None:
    """The file of a key; `None` where nothing is kept."""
    folder = cache_folder()
    if folder is None:
        return None
    text = repr((_code(), jax.__version__, sys.version_info[:2], key))
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.program"


@functools.cache
def _code() -> str:
    """A digest of the library's source: another version traces another program."""
    digest = hashlib.sha256()

    def walk(folder):
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if entry.is_dir() and entry.name != "__pycache__":
                walk(entry)
            elif entry.name.endswith(".py"):
                digest.update(entry.read_bytes())

    for package in ("cmjax", "cmjax.models"):
        walk(resources.files(package))
    return digest.hexdigest()


def _forget_old(folder: Path) -> None:
    files = sorted(folder.glob("*.program"), key=lambda path: path.stat().st_mtime)
    for path in files[:-_KEPT]:
        path.unlink(missing_ok=True)
