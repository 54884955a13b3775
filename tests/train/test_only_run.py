"""Two runs never write into one folder."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.only_run import FILE, only_run

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from train.only_run import only_run
with only_run(Path(sys.argv[1])):
    (Path(sys.argv[1]) / "work").touch()
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_gone_however_it_ends(tmp_path):
    out = tmp_path / "out"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 30
        while not (out / "work").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        said = rf"another run writes there \(process {first.pid}\)"
        with pytest.raises(ValueError, match=said), only_run(out):
            pass
    finally:
        first.kill()
        first.wait()
    with only_run(out):
        assert (out / FILE).exists()


def test_a_folder_in_which_nothing_came_of_a_run_is_not_left_behind(tmp_path):
    with pytest.raises(ValueError, match="bad"), only_run(tmp_path / "out"):
        raise ValueError("bad")
    assert not (tmp_path / "out").exists()
