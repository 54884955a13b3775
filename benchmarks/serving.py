"""How fast traces are replayed.

    python -m benchmarks.serving [TRACE]

Prints, for Mooncake's hour (or the trace named) and for synthetic traces of 10^4 to 10^6 requests,
requests per second of the event loop on one core, and the memory of the process. Beside it: NVIDIA
says of its own simulator (Dynamo's, in Rust) that it replays 9,796 requests/s on a laptop.
"""

import resource
import sys
import time
from pathlib import Path

from cmjax.serving import Trace, generate, read_trace, serve

MOONCAKE = "../shared/data/serving_mooncake_conversation/conversation_trace.jsonl.gz"
SIZES = (10_000, 100_000, 1_000_000)
REPEATS = 5


def main() -> None:
    named = Path(sys.argv[1] if len(sys.argv) > 1 else MOONCAKE)
    if named.is_file():
        start = time.perf_counter()
        trace = read_trace(named)
        print(f"{named.name}: read in {time.perf_counter() - start:.2f} s")
        report(trace)
    for requests in SIZES:
        report(generate(
            "poisson", requests=requests, rate=60.0, prompt=8192, prompt_cv=1.0, output=343,
            output_cv=0.6, reuse=0.4, trees=64,
        ))  # fmt: skip


def report(trace: Trace) -> None:
    """The median of some runs; the first one prices the steps."""
    serve(trace.first(10))
    runs = [serve(trace, slo_ttft_ms=5000, slo_tpot_ms=50).wall_s for _ in range(REPEATS)]
    wall_s = sorted(runs)[REPEATS // 2]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{trace.requests:>9,} requests, {trace.output.sum() / 1e6:6.1f} M tokens: "
        f"{wall_s:7.3f} s, {trace.requests / wall_s:9,.0f} requests/s, {memory:.2f} GiB"
    )


if __name__ == "__main__":
    main()
