"""Compiled programs, kept between runs so that the next one starts at once.

XLA compiles a model's layers one by one, whether they are alike or not: functions that are called
become part of their callers, and of two layers each gets kernels of its own.
"""

import contextlib
import hashlib
import platform
from pathlib import Path

import jax

from cmjax.cores import usable_cores
from cmjax.files import cache_folder

_KEPT = 256
"""Most files in the folder; those written first go first."""
_LEAST_S = 0.3
"""What compiles faster is not kept."""
_CPU = Path("/proc/cpuinfo")


def keep_executables() -> None:
    """Have XLA keep what it compiles in the user's cache folder (`cmjax.files.cache_folder`), in a
    part for the instructions of this processor and as many cores, and take it from there.

    Does nothing where no folder is to be had, or where JAX was given one.
    """
    folder = cache_folder()
    if folder is None or jax.config.jax_compilation_cache_dir is not None:
        return
    digest = hashlib.sha256(f"{len(usable_cores())} {_instructions()}".encode())
    folder /= f"compiled-{digest.hexdigest()[:16]}"
    with contextlib.suppress(OSError):  # another process may forget them at the same time
        files = sorted(folder.glob("*-cache"), key=lambda path: path.stat().st_mtime)
        for path in files[:-_KEPT]:
            path.unlink(missing_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_S)


def _instructions() -> str:
    """What this processor can do, as far as the system tells."""
    if _CPU.is_file():
        for line in _CPU.read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.machine()} {platform.processor()}"
