"""How long `cmjax` takes to answer, as CPU seconds of whole processes.

    python -m benchmarks.startup [--repeat 3]

Each program is started afresh: the first prediction with an empty cache of traced programs, the
next ones with what it left there.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PREDICT = ("predict", "decode", "--json", os.devnull)
PROGRAMS = {
    "--help": ("--help",),
    "predict decode, first": PREDICT,
    "predict decode, again": PREDICT,
    "predict decode, another batch and context": (*PREDICT, "--batch", "32", "--prompt", "2048"),
    "predict decode, an SLO": (*PREDICT, "--slo-tpot-ms", "30"),
}


def measure(arguments: tuple[str, ...], cache: str) -> tuple[float, float]:
    """CPU seconds and seconds of one run."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [Path(sys.executable).with_name("cmjax"), *arguments],
        env=os.environ | {"CMJAX_CACHE": cache, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="runs of which the fastest counts")
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    for _ in range(options.repeat):
        with tempfile.TemporaryDirectory() as folder:
            cache = str(Path(folder) / "programs")
            for name, arguments in PROGRAMS.items():
                found[name].append(measure(arguments, cache))
    print(f"{'':>42} {'CPU s':>7} {'s':>7}")
    for name, runs in found.items():
        print(f"{name:>42} {min(cpu for cpu, _ in runs):7.2f} {min(wall for _, wall in runs):7.2f}")


if __name__ == "__main__":
    main()
