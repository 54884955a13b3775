"""Pipeline schedules: how long micro-batches take through the stages, and how many are in flight.

With m micro-batches, p stages, v chunks a stage, and f + b seconds of the slowest stage, a step is
m (f + b) plus the bubble:

    gpipe, 1f1b    (p - 1) (f + b)            GPipe (1811.06965), PipeDream-Flush (1806.03377)
    interleaved    (p - 1) (f + b) / v        Megatron (2104.04473), section 2.2
    zero_bubble    (p - 1) (f + b - 2 w)      ZB-H1 (2401.10241): w, the gradients of the weights,
                                              waits for nobody and fills gaps
"""

import dataclasses
from collections.abc import Sequence

from cmjax.parallelism.plan import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Seconds of one micro-batch.

    Fields:
      slowest: forward and backward on the slowest stage. total: the sum over all stages.
      weights: the part of `total` that is gradients of weights.
      send: one transfer between neighbouring stages; there are two, one each way.
    """

    slowest: float
    total: float
    weights: float
    send: float


def pipeline_s(
    schedule: Schedule, times: StageTimes, micro_batches: int, stages: int, chunks: int = 1
) -> float:
    """Seconds from the first micro-batch's start to the last one's end on all stages. Transfers
    are waited for, as in the schedules' first implementations.

    >>> even = StageTimes(slowest=3.0, total=48.0, weights=16.0, send=0.0)
    >>> pipeline_s("1f1b", even, micro_batches=32, stages=16)
    141.0
    """
    transfers = 2 * times.send if stages > 1 else 0.0
    busy = micro_batches * (times.slowest + chunks * transfers)
    others = times.total - times.slowest
    if schedule == "zero_bubble":
        others = others * (1 - 2 * times.weights / times.total)
    return busy + others / chunks + (stages - 1) * transfers


def bubble(schedule: Schedule, micro_batches: int, stages: int, chunks: int = 1) -> float:
    """Share of the pipeline's time that equal stages idle; for `zero_bubble` with its three parts
    of equal length, as its paper draws them.

    >>> f"{bubble('1f1b', 16, 8):.3f} {bubble('interleaved', 16, 8, 6):.3f}"
    '0.304 0.068'
    """
    part = 1 / 3 if schedule == "zero_bubble" else 1.0
    idle = (stages - 1) * part / chunks
    return idle / (micro_batches + idle)


def in_flight(
    schedule: Schedule, micro_batches: int, stages: int, chunks: int = 1, stage: int = 0
) -> float:
    """Micro-batches whose activations a stage keeps at most: all of them under GPipe, under 1F1B
    one for every stage from this one on, with v chunks the forward passes that go ahead
    (2205.05198, section 4: 1 + (p - 1) / (p v) times p on the first stage), and as many as there
    are stages under ZB-H1, whose gradients of weights wait.

    >>> [in_flight("1f1b", 16, 4, stage=stage) for stage in range(4)]
    [4.0, 3.0, 2.0, 1.0]
    """
    most = {
        "gpipe": micro_batches,
        "1f1b": stages - stage,
        "zero_bubble": stages,
        "interleaved": (2 * (stages - stage - 1) + (chunks - 1) * stages + 1) / chunks,
    }[schedule]
    return float(min(micro_batches, most))


def replay(
    schedule: Schedule, forward: Sequence[float], backward: Sequence[float], micro_batches: int
) -> float:
    """Seconds of `gpipe` or `1f1b` event by event, for stages of any times: every stage works off
    its queue, and waits for its neighbours. An oracle of `pipeline_s`.

    Raises: ValueError: another schedule.
    """
    if schedule not in ("gpipe", "1f1b"):
        raise ValueError(f"replay: knows gpipe and 1f1b, not {schedule}")
    stages, m = len(forward), micro_batches
    queues = []
    for stage in range(stages):
        ahead = m if schedule == "gpipe" else min(m, stages - stage)
        order = [("f", i) for i in range(ahead)]
        for i in range(m):
            order.append(("b", i))
            if ahead + i < m:
                order.append(("f", ahead + i))
        queues.append(order)
    done: dict[tuple[str, int, int], float] = {}
    free, place = [0.0] * stages, [0] * stages
    while any(place[s] < len(queues[s]) for s in range(stages)):
        for stage in range(stages):
            while place[stage] < len(queues[stage]):
                kind, i = queues[stage][place[stage]]
                if kind == "f":
                    before = ("f", stage - 1, i) if stage else None
                else:
                    before = ("b", stage + 1, i) if stage + 1 < stages else ("f", stage, i)
                if before is not None and before not in done:
                    break
                start = max(free[stage], done[before] if before else 0.0)
                free[stage] = start + (forward if kind == "f" else backward)[stage]
                done[kind, stage, i] = free[stage]
                place[stage] += 1
    return max(free)
