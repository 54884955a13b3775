"""How a process ends."""

import subprocess
import sys

import pytest

ENDS = """
import atexit, sys
from cmjax.interrupt import leave

atexit.register(print, "taken down")
print("said", end=" ")
leave(int(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [(0, "said taken down\n"), (2, "said taken down\n"), (130, "said "), (143, "said ")],
)
def test_after_a_signal_python_is_not_taken_down_under_threads_that_compute(code, said):
    command = [sys.executable, "-c", ENDS, str(code)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (code, said, "")


def test_semaphores_of_workers_do_not_outlive_it():
    code = (
        "import multiprocessing\nfrom cmjax.interrupt import leave\n"
        "lock = multiprocessing.get_context('spawn').Lock()\nleave(130)"
    )
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (130, "")
