"""Programs that several processes run together on this machine."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_address() -> str:
    """HOST:PORT that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def run_together(module: str, options: Sequence[str], processes: int = 2) -> list[str]:
    """`python -m module options` as so many processes, to their end; what each wrote to standard
    output. A process that fails fails the test, with what it said."""
    command = [sys.executable, "-m", module, *options, "--coordinator", free_address()]
    running = [
        subprocess.Popen(
            [*command, f"--processes={processes}", f"--process-id={number}"],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name != "CMJAX_DATA"},
        )
        for number in range(processes)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=500) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (out, error) in zip(running, said, strict=True):
        assert process.returncode == 0, out + error
    return [out for out, _ in said]
