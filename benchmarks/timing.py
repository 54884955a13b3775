"""How candidates are timed side by side. Imports nothing that starts threads."""

import time
from collections.abc import Callable, Mapping

CALLS = 5  # of a turn
TURN_S = 0.2  # after which a turn makes no further call: slow programs take turns more often
REST_S = 0.02  # before a turn, where there are several threads
ROUNDS = 3


def least_times[Name](
    runs: Mapping[Name, Callable[[], object]],
    seconds: float,
    threads: int = 1,
    *,
    rounds: int = ROUNDS,
    calls: int = CALLS,
) -> dict[Name, float]:
    """Least seconds of each run, all taking turns of several calls in one process.

    One thread: CPU time of the process; more: wall time, with a rest before each turn, because the
    threads of some libraries spin for a while after a call, on the cores of the next.

    Args:
      runs: what to call, warmed up here by one call each.
      seconds: all turns together take at least this long.
      threads: that the runs use.
      rounds: turns of each run, at least.
      calls: calls of a turn, or as many as begin in `TURN_S`.
    """
    clock, rest = (time.process_time, 0.0) if threads == 1 else (time.perf_counter, REST_S)
    for run in runs.values():
        run()
    least = dict.fromkeys(runs, float("inf"))
    done, end = 0, time.perf_counter() + seconds
    while done < rounds or time.perf_counter() < end:
        done += 1
        for name, run in runs.items():
            time.sleep(rest)
            turn_end = time.perf_counter() + TURN_S
            for call in range(calls):
                if call and time.perf_counter() > turn_end:
                    break
                start = clock()
                run()
                least[name] = min(least[name], clock() - start)
    return least
