"""Placement and serving, stopped at any moment: one line, an exit code, and the old file or a whole
new one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "place": "place loads.npy --ranks 8 --seconds 1 --plot out.png --html out.html --json out.json",
    "serve": "serve poisson:rate=6,requests=20000,prompt=2048,output=64 --json out.json "
    "--perfetto out.trace --html out.html --per-request out.csv",
}
KINDS = (
    (signal.SIGINT, (130, 0), "interrupted"),  # a search ends with its best so far: 0
    (signal.SIGTERM, (143,), "terminated"),
    (signal.SIGKILL, (-9,), None),
)


def _begin(command: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "cmjax", *COMMANDS[command].split()],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def _is_whole(path: Path) -> bool:
    data = path.read_bytes()
    if path.suffix in (".json", ".trace"):
        return isinstance(json.loads(data), dict | list)
    endings = {".png": b"IEND\xaeB`\x82", ".html": b"</html>\n", ".csv": b"\n"}
    return data.endswith(endings[path.suffix])


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_in_any_moment_leaves_the_old_files_or_whole_new_ones(command, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "loads.npy", rng.integers(1, 1000, (4, 32)))
    begun = time.monotonic()
    whole = _begin(command, tmp_path)
    _, said = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    taken = time.monotonic() - begun
    targets = sorted(tmp_path.glob("out.*"))
    assert targets and all(map(_is_whole, targets))
    for moment in range(10):
        for path in targets:
            path.write_text("old")
        number, codes, line = KINDS[moment % len(KINDS)]
        process = _begin(command, tmp_path)
        time.sleep(0.5 + max(taken - 0.5, 0) * moment / 9)  # before that Python itself starts
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        new = all(path.read_bytes() != b"old" for path in targets)
        if not (new and process.returncode in (0, -number)):  # done, and Python itself leaving
            assert process.returncode in codes, said
            if line is not None:
                assert said.splitlines()[-1:] == [line] and "Traceback" not in said, said
        for path in targets:
            assert path.read_bytes() == b"old" or _is_whole(path), path
        unfinished = list(tmp_path.glob(".cmjax-*"))
        if number != signal.SIGKILL:
            assert not unfinished
        for path in unfinished:  # nobody tidies up behind a SIGKILL
            path.unlink()
