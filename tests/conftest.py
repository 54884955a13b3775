"""The test session's JAX: CPU, eight emulated devices, float64 available, no silent promotion;
and annotations that are checked."""

import gc
import itertools
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers is a peer for files on disk alone
# Most of the suite's time is compiling programs that run once; JAX_DISABLE_MOST_OPTIMIZATIONS=0 has
# them compiled as users have them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Traced programs are shared by the session's processes, and by no other session.
os.environ.setdefault("CMJAX_CACHE", tempfile.mkdtemp(prefix="cmjax-programs-"))

import jax
import pytest
from hypothesis import settings

from tests import annotations

# What another test, process or run compiled for this processor is not compiled again.
COMPILED = Path(__file__).parents[1] / ".pytest_cache/compiled"
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

CHECKED = (
    "cmjax.primitives",
    "cmjax.placement",
    "cmjax.cost",
    "cmjax.models",
    "cmjax.deploy",
)
"""Packages whose annotations are checked at every call; see `tests.annotations`."""

UNCHECKED = ("cmjax.primitives.convolution.kernel",)
"""The C++ kernel refuses what does not fit in its own words, once it runs."""

annotations.install(CHECKED, but=UNCHECKED)

# The first example of a property compiles, and every run tries the same examples.
settings.register_profile("cmjax", deadline=None, derandomize=True)
settings.load_profile("cmjax")

LONGEST = frozenset(Path(__file__).with_name("longest.txt").read_text("utf-8").splitlines())
"""Files, functions and cases that are slow beside those marked so in place: each took more than
1.3 s of CPU where two processes ran the whole suite. Where a function is named, half of its cases
did."""


def pytest_collection_finish():
    """Modules and tests live as long as the process: the collector need not walk them again, nor
    come after every 700 of the objects that tracing makes by the million."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the longest tests slow."""
    for item in items:
        name = item.nodeid.split("[")[0]
        if not LONGEST.isdisjoint((item.nodeid, name, name.split("::")[0])):
            item.add_marker(pytest.mark.slow)


UNTIL = float(os.environ.get("CMJAX_SLOW_TESTS_UNTIL", "inf"))
"""Seconds since 1970 after which slow tests are skipped, for a run whose time is limited."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip slow tests once their time is over."""
    if time.time() > UNTIL and item.get_closest_marker("slow"):
        pytest.skip("CMJAX_SLOW_TESTS_UNTIL is over: run it with make test-slow")


_ENDED = itertools.count()
MOST_MAPS = 40_000
"""Compiled programs are memory maps; XLA dies of the 65,530th, which Linux does not give."""


def pytest_runtest_teardown(item, nextitem):
    """Forget compiled programs before a process runs out of memory maps."""
    maps = Path("/proc/self/maps")
    if next(_ENDED) % 16 == 0 and maps.exists():
        with maps.open("rb") as lines:
            many = sum(1 for _ in lines) > MOST_MAPS
        if many:
            jax.clear_caches()


DATA = Path(os.environ.get("CMJAX_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of public data sets; a test that needs it is skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"public data not found at {DATA}; set CMJAX_DATA to its folder")
    return DATA
