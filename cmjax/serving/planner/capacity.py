"""The plan: sizes of instances are priced, the fluid model proposes, the simulator decides.

Candidates around the proposals differ by an instance more or less of each kind and by the batch
limit; the best one's neighbours are tried again until none is better.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np

from cmjax.console import Progress
from cmjax.hardware import Supernode, as_machine
from cmjax.inputs import check_count, check_number, check_seed
from cmjax.serving.assemble import Replay, decode_steps
from cmjax.serving.cache_curve import cache_hits
from cmjax.serving.planner.cache_size import CacheSize, cache_sizes, smallest_enough
from cmjax.serving.planner.fluid import Demand, Fluid, Proposal, at, propose
from cmjax.serving.planner.judge import Judged, Question, judge
from cmjax.serving.serve import best_latencies, check_slo
from cmjax.serving.service import ContextCache, DecodePool, PrefillPool, Service
from cmjax.serving.step_times import StepTimes, price_service
from cmjax.serving.traces import Trace
from cmjax.sweep import executor_of, run_all

PREFILL_NPUS, DECODE_NPUS = (16, 32), (32, 64, 96, 160)
_LARGEST_BATCH = 192  # requests per NPU that are priced
_SIMULATED, _ROUNDS = 8, 3


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CapacityPlan:
    """The best service found, and what was found on the way.

    Fields:
      best: judged by the simulator. tried: all that were, best first.
      proposal: the fluid model at the best one: its rate, slopes and limits.
      bound_by: `prefill`, `decode`, `rdma`, or `cache` where prefill is and more cache would help.
      instance_worth: requests per second per NPU that one more instance of a pool adds, simulated
        beyond `npus`.
      cache_worth: requests per second that twice the cache adds, by the fluid model.
      cache: the best split with ever smaller caches, the whole one first; empty where the trace
        says nothing of prefixes or there is no cache.
      npus, slo_ttft_ms, slo_tpot_ms, target: what was asked for.
    """

    best: Judged
    tried: list[Judged]
    proposal: Proposal
    bound_by: str
    instance_worth: dict[str, float]
    cache_worth: float
    cache: list[CacheSize]
    npus: int
    slo_ttft_ms: float | None
    slo_tpot_ms: float | None
    target: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: the JSON of `cmjax plan`."""
        return {
            **_row(self.best),
            "goodput_per_npu": self.best.goodput_requests_per_s / self.npus,
            "bound_by": self.bound_by,
            "one_more_npu": {
                "prefill": self.proposal.per_prefill_npu,
                "decode": self.proposal.per_decode_npu,
                "prefill_simulated": self.instance_worth["prefill"],
                "decode_simulated": self.instance_worth["decode"],
            },
            "twice_the_cache": self.cache_worth,
            "cache": [dataclasses.asdict(size) for size in self.cache],
            "cache_enough": dataclasses.asdict(smallest_enough(self.cache)) if self.cache else None,
            "fluid_requests_per_s": self.proposal.rate,
            "fluid_limits": {k: float(v) for k, v in self.proposal.limits._asdict().items()},
            "npus": self.npus,
            "slo_ttft_ms": self.slo_ttft_ms,
            "slo_tpot_ms": self.slo_tpot_ms,
            "target_attainment": self.target,
            "deployment": dataclasses.asdict(self.best.service) | {"losses": []},
            "tried": [_row(found) for found in self.tried],
        }

    def pareto(self) -> list[Judged]:
        """Of all tried, those that no other beats in throughput and in TPOT."""
        known = [found for found in self.tried if found.rate_scale]
        order = sorted(known, key=lambda f: (f.tpot_p50_ms, -f.output_tokens_per_s))
        kept: list[Judged] = []
        for found in order:
            if not kept or found.output_tokens_per_s > kept[-1].output_tokens_per_s:
                kept.append(found)
        return kept


def plan(
    trace: Trace,
    machine: Supernode | str = "cloudmatrix384",
    *,
    npus: int = 384,
    slo_ttft_ms: float | None = None,
    slo_tpot_ms: float | None = None,
    target: float = 0.9,
    service: Service | None = None,
    prefill_npus: Sequence[int] = PREFILL_NPUS,
    decode_npus: Sequence[int] = DECODE_NPUS,
    seed: int = 0,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> CapacityPlan:
    """Split NPUs into prefill and decode instances for the most requests per second within the SLO.

    Args:
      trace: whose requests are served, at whatever rate. machine: as in `serve`.
      npus: to split. slo_ttft_ms, slo_tpot_ms: what a good request keeps; one is needed.
      target: share of the requests offered that must keep it.
      service: model, formats, cache and rules (default: the paper's); of its pools only `tp` stays.
      prefill_npus, decode_npus: sizes of instances to consider; all dies of one are its EP group.
      seed: of accepted drafts. executor: where candidates are priced and simulated (default: a
        process per core); results do not depend on it.
      progress: called with candidates done, candidates, and what is being done.
    Raises: ValueError: no SLO, or one that nobody keeps, with the best that can be reached; no size
      that fits.
    """
    machine = as_machine(machine)
    if slo_ttft_ms is None and slo_tpot_ms is None:
        raise ValueError("plan needs an SLO: slo-ttft-ms, slo-tpot-ms or both")
    if not 0 < target <= 1:
        raise ValueError(f"target must lie in 0..1, got {target:g}")
    check_seed("seed", seed)
    for name, ms in (("slo-ttft-ms", slo_ttft_ms), ("slo-tpot-ms", slo_tpot_ms)):
        if ms is not None:
            check_number(name, ms, above=0)
    for name, sizes in (("prefill-npus", prefill_npus), ("decode-npus", decode_npus)):
        if not sizes:
            raise ValueError(f"{name} names no size")
        for size in sizes:
            check_count(name, size)
    check_count("npus", npus)
    if npus > machine.npus:
        raise ValueError(f"npus {npus}: {machine.name} has {machine.npus}")
    if not trace.duration_s:
        raise ValueError(
            f"{trace.source}: all requests arrive at once, so that there is no rate to scale; give "
            "a rate in requests per second"
        )
    if executor is None:
        with executor_of() as found:
            return plan(
                trace, machine, npus=npus, slo_ttft_ms=slo_ttft_ms, slo_tpot_ms=slo_tpot_ms,
                target=target, service=service, prefill_npus=prefill_npus,
                decode_npus=decode_npus, seed=seed, executor=found, progress=progress,
            )  # fmt: skip
    replay = Replay(
        slo_ttft_s=None if slo_ttft_ms is None else slo_ttft_ms * 1e-3,
        slo_tpot_s=None if slo_tpot_ms is None else slo_tpot_ms * 1e-3,
        seed=seed,
    )
    base = service or Service(name="plan", cache=ContextCache())
    search = _Search(trace, machine, base, replay, npus, target, executor, progress)
    return search.run(prefill_npus, decode_npus, slo_ttft_ms, slo_tpot_ms)


@dataclasses.dataclass(frozen=True)
class Size:
    """A pair of instance sizes to be priced; all that another process needs."""

    service: Service
    machine: Supernode


def price_pair(size: Size) -> StepTimes | str:
    """Step times, or why there are none."""
    try:
        size.service.check(size.machine)
        return price_service(size.service, size.machine)
    except ValueError as error:
        return str(error)


class _Search:
    """The search's constants, and the services that have been judged."""

    def __init__(self, trace, machine, base, replay, npus, target, executor, progress):
        self.trace, self.machine, self.base, self.replay = trace, machine, base, replay
        self.npus, self.target, self.executor = npus, target, executor
        self.progress = progress
        self.tp = {"prefill": 1, "decode": 1} | {n: pool.tp for n, pool in base.pools.items()}
        self.ranks_per_npu = machine.dies_per_npu / self.tp["decode"]
        self.judged: dict[Service, Judged] = {}

    def run(self, prefill_npus, decode_npus, slo_ttft_ms, slo_tpot_ms) -> CapacityPlan:
        priced = self._keeping(self._price(prefill_npus, decode_npus))
        hits = self._hit_share(next(iter(priced.values())))
        fluids = {pair: self._fluid(pair, times, hits) for pair, times in priced.items()}
        proposals = {pair: propose(fluid, self.npus) for pair, fluid in fluids.items()}
        first = [
            (self._flow(service, fluids[pair]).rate, service)
            for pair in priced
            for service in self._around(pair, proposals[pair])
        ]
        first.sort(key=lambda entry: -entry[0])
        best = self._best([service for _, service in first[:_SIMULATED]], priced, proposals)
        for _ in range(_ROUNDS):
            found = self._best(self._neighbours(best.service), priced, proposals)
            if found is best:
                break
            best = found
        if not best.rate_scale:
            raise ValueError(
                f"no split of {self.npus} NPUs keeps the SLO for {self.target:.0%} of the requests "
                "at any rate tried; ask for a longer one, or for a smaller share (target)"
            )
        pair = _pair(best.service)
        proposal = self._flow(best.service, fluids[pair])
        worth = self._worth(best, priced, proposals)
        limits = proposal.limits._asdict()
        bound = min(limits, key=lambda name: limits[name])
        more = dataclasses.replace(
            fluids[pair],
            demand=self._demand(priced[pair], self._hit_share(priced[pair], 2.0)),
        )
        cache_worth = self._flow(best.service, more).rate - proposal.rate
        if bound == "prefill" and cache_worth > 0.05 * proposal.rate:
            bound = "cache"
        return CapacityPlan(
            best=best,
            tried=sorted(self.judged.values(), key=lambda f: -f.goodput_requests_per_s),
            proposal=proposal,
            bound_by=bound,
            instance_worth=worth,
            cache_worth=cache_worth,
            cache=self._cache(best, priced, proposals),
            npus=self.npus,
            slo_ttft_ms=slo_ttft_ms,
            slo_tpot_ms=slo_tpot_ms,
            target=self.target,
        )

    def _price(self, prefill_npus, decode_npus) -> dict[tuple[int, int], StepTimes]:
        """Of every pair that fits; a size is priced once per process that has it."""
        pairs = [
            (p, d) for p, d in itertools.product(prefill_npus, decode_npus) if p + d <= self.npus
        ]
        if not pairs:
            raise ValueError(
                f"npus {self.npus} holds no pair of instances; the smallest is one of "
                f"{min(prefill_npus)} for prefill and one of {min(decode_npus)} for decode"
            )
        sizes = [Size(self._service(p, d, 1, 1, _LARGEST_BATCH), self.machine) for p, d in pairs]
        priced = run_all(price_pair, sizes, self.executor, self._say("pricing"))
        found = {q: t for q, t in zip(pairs, priced, strict=True) if isinstance(t, StepTimes)}
        longest = int((self.trace.prompt + self.trace.output).max()) + 1
        found = {q: t for q, t in found.items() if t.kv_tokens["decode"] >= longest}
        if not found:
            reasons = [t for t in priced if isinstance(t, str)]
            raise ValueError(reasons[0] if reasons else "no instance holds the longest request")
        return found

    def _keeping(self, priced) -> dict[tuple[int, int], StepTimes]:
        """The pairs on which a lone request keeps the SLO.

        Raises: ValueError: there is none, with the best that the fastest of them reaches.
        """
        errors = {}
        for pair, times in priced.items():
            prefill, decode = pair
            service = self._service(prefill, decode, 1, 1, _LARGEST_BATCH)
            try:
                check_slo(self.trace, service, times, self.replay)
            except ValueError as error:
                errors[pair] = sum(best_latencies(self.trace, service, times)), error
        if len(errors) == len(priced):
            raise min(errors.values(), key=lambda found: found[0])[1]
        return {pair: times for pair, times in priced.items() if pair not in errors}

    def _service(
        self, prefill: int, decode: int, prefills: int, decodes: int, batch: int
    ) -> Service:
        return dataclasses.replace(
            self.base,
            prefill=PrefillPool(npus=prefill, instances=prefills, tp=self.tp["prefill"]),
            decode=DecodePool(npus=decode, instances=decodes, batch=batch, tp=self.tp["decode"]),
            colocated=None,
        )

    def _hit_share(self, times: StepTimes, factor: float = 1.0) -> float:
        """Of prompt tokens, in a cache of the service's size."""
        cache = self.base.cache
        if cache is None or not self.trace.has_blocks:
            return 0.0
        return cache_hits(self.trace, int(self._held(cache, times) * factor)).tokens

    def _held(self, cache: ContextCache, times: StepTimes) -> int:
        """Blocks of a cache."""
        if cache.blocks is not None:
            return cache.blocks
        return int(cache.gb_per_node / self._block_gb_per_node(times))

    def _block_gb_per_node(self, times: StepTimes) -> float:
        nodes = -(-self.npus // self.machine.npus_per_node)
        return times.kv_token_bytes * self.trace.block_tokens / 1e9 / nodes

    def _cache(self, best: Judged, priced, proposals) -> list[CacheSize]:
        """The best split with less and less of the cache."""
        cache = self.base.cache
        if cache is None or not self.trace.has_blocks:
            return []
        times = priced[_pair(best.service)]
        held, block_gb = self._held(cache, times), self._block_gb_per_node(times)

        def judge_all(services: Sequence[Service]) -> list[Judged]:
            questions = [self._question(service, priced, proposals) for service in services]
            return run_all(judge, questions, self.executor, self._say("sizing the cache"))

        return cache_sizes(best, min(held, self.trace.blocks), block_gb, judge_all)

    def _demand(self, times: StepTimes, hits: float) -> Demand:
        prompt, output = self.trace.prompt.astype(float), self.trace.output
        steps = decode_steps(output, times.gain, self.replay.seed).astype(float)
        during = (prompt + output / 2) * steps
        return Demand(
            uncached_tokens=float(prompt.mean() * (1 - hits)),
            length=float((prompt**2).sum() / prompt.sum()),
            prompt_tokens=float(prompt.mean()),
            steps=float(steps.mean()),
            context=float(during.sum() / max(steps.sum(), 1.0)),
        )

    def _fluid(self, pair: tuple[int, int], times: StepTimes, hits: float) -> Fluid:
        prefill, decode = pair
        slo_s = self.replay.slo_tpot_s
        return Fluid(
            prefill=times.tables["prefill"], decode=times.tables["decode"],
            prefill_npus=prefill, decode_npus=decode, dies_per_npu=self.machine.dies_per_npu,
            ranks_per_npu=self.ranks_per_npu,
            prefill_tokens=float(PrefillPool(npus=prefill).step_tokens),
            kv_tokens=float(times.kv_tokens["decode"]), tokens_per_step=times.tokens_per_step,
            handover_token_s=times.kv_token_bytes
            / float(self.machine.fabric.rdma.bandwidth_bytes_per_s),
            slo_tpot_s=np.inf if slo_s is None else slo_s,
            demand=self._demand(times, hits),
        )  # fmt: skip

    def _around(self, pair: tuple[int, int], proposal: Proposal) -> list[Service]:
        """Whole instances next to a proposal."""
        prefill, decode = pair
        batch = max(1, round(proposal.per_rank * self.ranks_per_npu))
        found = []
        for decodes in {int(proposal.decode_npus // decode) + more for more in (0, 1)}:
            prefills = (self.npus - decodes * decode) // prefill
            if decodes >= 1 and prefills >= 1:
                found.append(self._service(prefill, decode, prefills, decodes, batch))
        return found

    def _flow(self, service: Service, fluid: Fluid) -> Proposal:
        """The fluid model at whole instances, which leave some NPUs over."""
        prefill, decode = service.prefill, service.decode
        assert prefill is not None and decode is not None
        per_rank = min(decode.batch / fluid.ranks_per_npu, fluid.most_per_rank())
        return at(fluid, float(prefill.total_npus), float(decode.total_npus), per_rank)

    def _neighbours(self, service: Service) -> list[Service]:
        prefill, decode = service.prefill, service.decode
        assert prefill is not None and decode is not None
        found = []
        for more in (-1, 1):
            decodes = decode.instances + more
            prefills = (self.npus - decodes * decode.npus) // prefill.npus
            if decodes >= 1 and prefills >= 1:
                found.append(
                    self._service(prefill.npus, decode.npus, prefills, decodes, decode.batch)
                )
        for factor in (0.75, 1.33):
            batch = min(max(1, round(decode.batch * factor)), _LARGEST_BATCH)
            pool = dataclasses.replace(decode, batch=batch)
            found.append(dataclasses.replace(service, decode=pool))
        return found

    def _best(self, services, priced, proposals) -> Judged:
        """Judge what is new; the best of all."""
        new = [s for s in dict.fromkeys(services) if s not in self.judged]
        questions = [self._question(s, priced, proposals) for s in new]
        found = run_all(judge, questions, self.executor, self._say("simulating"))
        self.judged |= zip(new, found, strict=True)
        return max(self.judged.values(), key=lambda f: f.goodput_requests_per_s)

    def _question(self, service: Service, priced, proposals) -> Question:
        pair = _pair(service)
        guess = proposals[pair].rate / self.trace.rate * 0.6
        return Question(
            service=service, times=priced[pair], trace=self.trace, machine=self.machine,
            replay=self.replay, guess=guess, target=self.target,
        )  # fmt: skip

    def _worth(self, best: Judged, priced, proposals) -> dict[str, float]:
        """Requests per second per NPU of one more instance of each kind, beyond `npus`."""
        service = best.service
        more = []
        for name, pool in service.pools.items():
            bigger = dataclasses.replace(pool, instances=pool.instances + 1)
            more.append(dataclasses.replace(service, **{name: bigger}))
        questions = [self._question(s, priced, proposals) for s in more]
        found = run_all(judge, questions, self.executor, self._say("simulating"))
        return {
            name: (f.goodput_requests_per_s - best.goodput_requests_per_s) / pool.npus
            for (name, pool), f in zip(service.pools.items(), found, strict=True)
        }

    def _say(self, what: str):
        if self.progress is None:
            return None
        return lambda done, total, _: self.progress(done, total, what)  # type: ignore[misc]


def _pair(service: Service) -> tuple[int, int]:
    assert service.prefill is not None and service.decode is not None
    return service.prefill.npus, service.decode.npus


def _row(found: Judged) -> dict[str, Any]:
    prefill, decode = found.service.prefill, found.service.decode
    assert prefill is not None and decode is not None
    return {
        "prefill_instances": prefill.instances,
        "prefill_npus": prefill.npus,
        "decode_instances": decode.instances,
        "decode_npus": decode.npus,
        "batch_per_npu": decode.batch,
        "goodput_requests_per_s": found.goodput_requests_per_s,
        "rate_scale": found.rate_scale,
        "slo_attainment": found.attainment,
        "output_tokens_per_s": found.output_tokens_per_s,
        "ttft_p99_ms": _number(found.ttft_p99_ms),
        "tpot_p50_ms": _number(found.tpot_p50_ms),
        "tpot_p99_ms": _number(found.tpot_p99_ms),
        "busy": found.busy,
        "cache_hit_tokens": found.cache_hit_tokens,
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
