"""The cores of a machine that this process computes on, and which of them are its share."""

import hashlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def keep_to_cores(cores: Sequence[int]) -> None:
    """Keep this process, and the threads it will start, to some of its cores, where the system
    can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def share_of_cores(cores: Sequence[int], place: int, count: int) -> list[int]:
    """The cores of process `place` of `count` that may all use the same `cores`: neighbours, as
    evenly as they divide. More processes than cores take turns on them, one each.

    >>> [share_of_cores(range(5), place, 2) for place in range(2)]
    [[0, 1], [2, 3, 4]]
    >>> [share_of_cores([3, 7], place, 3) for place in range(3)]
    [[3], [7], [3]]
    """
    if count > len(cores):
        return [cores[place % len(cores)]]
    return list(cores[place * len(cores) // count : (place + 1) * len(cores) // count])


def name_of_cores() -> str:
    """A name that processes have in common if they may use the same cores of the same machine."""
    machine = _BOOT.read_text() if _BOOT.is_file() else platform.node()
    return hashlib.sha256(f"{machine} {usable_cores()}".encode()).hexdigest()[:16]
