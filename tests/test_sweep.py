"""One way to outgrow a machine: sweeps over any executor, whole or as their items are done."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cmjax.sweep import WorkerPool, as_done, run_all


def test_items_come_as_they_are_done_with_their_index():
    first = threading.Event()

    def waits(item: int) -> int:
        if item == 0:
            assert first.wait(10)
        return 10 * item

    with ThreadPoolExecutor(2) as executor:
        found = as_done(waits, [0, 1], executor)
        assert next(found) == (1, 10)
        first.set()
        assert list(found) == [(0, 0)]


def test_after_so_long_no_item_is_begun_and_those_that_run_are_kept():
    begun = []

    def slow(item: int) -> int:
        begun.append(item)
        time.sleep(0.2)
        return item

    with ThreadPoolExecutor(1) as executor:
        found = list(as_done(slow, range(20), executor, seconds=0.1))
    assert 1 <= len(found) < 20
    assert [at for at, _ in found] == begun


def test_what_a_call_raises_ends_the_sweep():
    calls = []

    def fails(item: int) -> int:
        calls.append(item)
        time.sleep(0.05)
        raise ValueError(f"item {item}")

    with ThreadPoolExecutor(1) as executor, pytest.raises(ValueError, match="item 0"):
        list(as_done(fails, range(50), executor))
    assert len(calls) < 50
    with ThreadPoolExecutor(2) as executor, pytest.raises(ValueError, match="item 0"):
        run_all(fails, range(4), executor)


FAILS = """
import sys, time
from pathlib import Path
from cmjax.__main__ import main
from cmjax.console import exit_code
from cmjax.sweep import executor_of

BEGUN, WHILE = Path(__file__).with_suffix(".begun"), sys.argv[1]

def begin():
    BEGUN.touch()
    time.sleep(60)

if __name__ != "__main__" and WHILE == "importing":
    begin()

def run():
    with executor_of(workers=2) as executor:
        for _ in range(4):
            executor.submit(begin)
        while not BEGUN.exists():
            time.sleep(0.01)
        raise ValueError("not so")

if __name__ == "__main__":
    sys.exit(exit_code(run))
"""


@pytest.mark.slow
@pytest.mark.parametrize("doing", ["importing", "working"])
def test_a_failure_beside_workers_is_one_line(doing, tmp_path):
    """Who started them ends them, and they have nothing to say."""
    path = tmp_path / "fails.py"
    path.write_text(FAILS)
    command = [sys.executable, str(path), doing]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (found.returncode, found.stderr) == (2, "error: not so\n")


def test_a_place_with_no_workers_is_refused():
    with (
        pytest.raises(ValueError, match="workers must be at least 1, got 0"),
        WorkerPool(workers=0).executor(),
    ):
        pass
