"""Replay a trace through a service on a machine."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from cmjax.console import Progress
from cmjax.hardware import Supernode, as_machine
from cmjax.inputs import MOST_SIZE, check_count, check_number, check_seed
from cmjax.serving.assemble import Replay, assemble
from cmjax.serving.engine import engine_in_use, run
from cmjax.serving.engine.table import Lookup
from cmjax.serving.result import ServingResult
from cmjax.serving.service import Service, paper_service
from cmjax.serving.service_file import read_service
from cmjax.serving.step_times import StepTimes, price_service, step_spread
from cmjax.serving.traces import Trace, read_trace


def serve(
    trace: Trace | str | Path,
    deployment: Service | str | Path | None = None,
    machine: Supernode | str | Path = "cloudmatrix384",
    *,
    npus: int = 384,
    slo_ttft_ms: float | None = None,
    slo_tpot_ms: float | None = None,
    rate_scale: float = 1.0,
    cache_blocks: int | None = None,
    clients: int = 0,
    think_s: float = 0.0,
    uncertainty: float | None = None,
    seed: int = 0,
    record: int = 0,
    times: StepTimes | None = None,
    progress: Progress | None = None,
    **fields: Any,
) -> ServingResult:
    """Replay a trace through prefill, decode and cache pools.

    Args:
      trace: a `Trace`, or what `read_trace` takes: a file, or `poisson:rate=4,requests=1000`.
      deployment: a `Service`, a `.toml` file, or a name; `None` is the paper's instances, prefill
        of 16 NPUs and decode of 160, filling `npus`.
      machine: a `Supernode`, the name of one in the catalog, or a `.toml` file.
      npus: see `deployment`.
      slo_ttft_ms, slo_tpot_ms: what a good request keeps.
      rate_scale: offer so many times as many requests per second.
      cache_blocks: blocks of the context cache; 0 is none, `None` as the deployment says.
      clients, think_s: a closed loop of so many clients, in place of the recorded times.
      uncertainty: of step times, relative: the run is repeated with faster and with slower steps,
        for an interval of every number; 0 is one run. `None` is what 90 % of the predicted steps
        lie within, and one run where `times` are given.
      seed: of accepted drafts. Equal seeds give equal results, bit for bit.
      record: how many busy intervals of instances to keep, for a picture of them.
      times: step times, in place of those priced for the machine.
      progress: called with requests ended, requests, "".
      **fields: of the `Service`, to be replaced, such as `router="cache-aware"`.
    Raises: ValueError: a trace or deployment that makes no sense, a deployment larger than the
      machine or that cannot hold the longest request, an SLO that not even a lone request keeps.

    >>> import cmjax
    >>> found = cmjax.serve("poisson:rate=2,requests=50,prompt=2048,output=64")
    >>> found.verdict, found.to_dict()["completed"]
    ('stable', 50)
    """
    machine = as_machine(machine)
    if not isinstance(trace, Trace):
        trace = read_trace(trace, seed=seed)
    if rate_scale != 1.0:
        trace = trace.faster(rate_scale)
    service = _service(deployment, npus, cache_blocks, fields)
    service.check(machine)
    check_count("clients", clients, least=0)
    check_number("think_s", think_s, least=0, most=MOST_SIZE)
    if uncertainty is not None and not 0 <= uncertainty < 1:
        raise ValueError(f"uncertainty must lie in 0..1, got {uncertainty:g}")
    check_seed("seed", seed)
    priced = times is None
    if times is None:
        times = price_service(service, machine)
    replay = Replay(
        slo_ttft_s=_seconds("slo-ttft-ms", slo_ttft_ms),
        slo_tpot_s=_seconds("slo-tpot-ms", slo_tpot_ms),
        clients=clients,
        think_s=think_s,
        seed=seed,
        record=record,
    )
    check_slo(trace, service, times, replay)
    found = simulate(trace, service, machine, times, replay, progress)
    ends = _ends(uncertainty, service, machine) if priced or uncertainty else ()
    if not ends:
        return found
    faster, slower = (
        simulate(trace, service, machine, times.scaled(factors), replay) for factors in ends
    )
    return dataclasses.replace(found, bounds=(faster, slower))


def simulate(
    trace: Trace,
    service: Service,
    machine: Supernode,
    times: StepTimes,
    replay: Replay,
    progress: Progress | None = None,
) -> ServingResult:
    """Replay once, everything given.

    Raises: ValueError: an instance that cannot hold the longest request.
    """
    given = assemble(trace, service, machine, times, replay)
    start = time.perf_counter()

    def report(ended: int) -> bool:
        if progress is not None:
            progress(ended, trace.requests, "")
        return False

    outputs = run(given, report)
    return ServingResult(
        trace=trace,
        service=service,
        machine=machine.name,
        times=times,
        replay=replay,
        outputs=outputs,
        bin_s=outputs.bin_s,
        wall_s=time.perf_counter() - start,
        engine=engine_in_use(),
    )


def best_latencies(trace: Trace, service: Service, times: StepTimes) -> tuple[float, float]:
    """With nobody else, in s: TTFT of the trace's shortest prompt, TPOT at its context."""
    first = "prefill" if service.prefill else "colocated"
    then = "decode" if service.decode else "colocated"
    shortest = int(trace.prompt.min())
    computed = 1 if service.cache is not None and trace.has_blocks else shortest
    ttft_s = Lookup(times.tables[first]).step_s(computed, float(computed), 0, 0.0, computed, 1)
    tpot_s = Lookup(times.tables[then]).step_s(0, 0.0, 1, float(shortest), 1, 1)
    return ttft_s, tpot_s / times.tokens_per_step


def check_slo(trace: Trace, service: Service, times: StepTimes, replay: Replay) -> None:
    """Raise ValueError, with the best that can be reached, for an SLO that nobody keeps."""
    best = best_latencies(trace, service, times)
    given = (replay.slo_ttft_s, replay.slo_tpot_s)
    if trace.output.max() == 1:
        given = (replay.slo_ttft_s, None)
    for name, slo_s, best_s in zip(("ttft", "tpot"), given, best, strict=True):
        if slo_s is not None and slo_s < best_s * (1 - times.worst_error):
            raise ValueError(
                f"slo-{name}-ms {slo_s * 1e3:g} cannot be met: the shortest request of "
                f"{trace.source} alone takes {best_s * 1e3:.3g} ms"
            )


def _ends(
    uncertainty: float | None, service: Service, machine: Supernode
) -> tuple[dict[str, float], ...]:
    """By how much steps may be faster and slower, by pool; nothing where that is not known."""
    if uncertainty is None:
        spread = step_spread(service, machine)
        return ({name: 1 / s for name, s in spread.items()}, spread) if spread else ()
    if uncertainty == 0:
        return ()
    return tuple(dict.fromkeys(service.pools, 1 + sign * uncertainty) for sign in (-1, 1))


def _service(deployment, npus: int, cache_blocks: int | None, fields: dict[str, Any]) -> Service:
    if deployment is None:
        service = paper_service(npus)
    elif isinstance(deployment, Service):
        service = deployment
    else:
        service = read_service(deployment, npus)
    known = {field.name for field in dataclasses.fields(Service)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(
            f"serve: unknown option {unknown[0]!r}; a Service has {', '.join(sorted(known))}"
        )
    service = dataclasses.replace(service, **fields)
    return service if cache_blocks is None else service.with_cache_blocks(cache_blocks)


def _seconds(name: str, ms: float | None) -> float | None:
    if ms is not None and not 0 < ms < float("inf"):
        raise ValueError(f"{name} must be positive, got {ms:g}")
    return None if ms is None else ms * 1e-3
