"""`cmjax serve`: a request trace through prefill, decode and cache pools."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from cmjax import report
from cmjax.console import check_target, emit, show_progress
from cmjax.hardware import load_machine
from cmjax.inputs import check_seed
from cmjax.serving import (
    Service,
    ServingResult,
    StepTimes,
    calibrate,
    measured_engine,
    read_measured,
    read_profile,
    read_trace,
    serve,
)
from cmjax.serving.calibrate import EngineConstants, Measured, compare, is_measured
from cmjax.serving.requests_file import check_suffix
from cmjax.serving.service import AdmissionName, RouterName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offered:
    """What arrives, and when.

    Attributes:
      first: Only the first so many requests of the trace.
      rate_scale: Offer so many times as many requests per second.
      rate: Poisson arrivals, requests per second, in place of recorded times.
      spread: Spread requests of one tick of a coarse clock over the tick.
      clients: A closed loop of so many clients in place of recorded times.
      think_s: Seconds between an answer and the next request of a client.
      seed: Of everything drawn; equal seeds give equal results.
    """

    first: int | None = None
    rate_scale: float = 1.0
    rate: float | None = None
    spread: bool = False
    clients: int = 0
    think_s: float = 0.0
    seed: int = 0

    def read(self, trace: str, progress=None):
        """The trace, so many of its requests, at the times asked for."""
        check_seed("seed", self.seed)
        found = read_trace(
            trace, requests=self.first, rate=self.rate, seed=self.seed, progress=progress
        )
        found = found.spread(self.seed) if self.spread else found
        return found if self.rate_scale == 1.0 else found.faster(self.rate_scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Where:
    """What serves.

    Attributes:
      deployment: A .toml file, or a name (default: the paper's instances, prefill of 16 NPUs and
        decode of 160, filling NPUS).
      npus: NPUs that a named deployment fills.
      on: Machine: a name of the catalog, or a .toml file.
      cache_blocks: Blocks of the context cache; 0 is none.
      router: Who takes a request, in place of what the deployment says.
      admission: Which requests are refused, in place of what the deployment says.
    """

    deployment: str | None = None
    npus: int = 384
    on: str = "cloudmatrix384"
    cache_blocks: int | None = None
    router: RouterName | None = None
    admission: AdmissionName | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Engine:
    """One engine of measured step times, in place of a deployment.

    Attributes:
      profile: Its step times: a CSV of steps, or a folder of kernel times of one layer.
      layers: Layers of the model, for kernel times of one.
      max_requests: Requests in a batch (max_num_seqs of vLLM).
      max_tokens: Tokens in a step (max_num_batched_tokens).
      kv_tokens: Tokens that its cache holds; 0 is more than it needs.
      calibrate: A measured run (JSON lines): fit the engine's constants to it first.
      calibrate_requests: Fit to the first so many of its requests only; the others are predicted.
      calibrate_profile: Step times of that run, where they are others.
      calibrate_max_requests: Requests in a batch of that run, where they are others.
      calibrate_kv_tokens: Tokens that the cache of that run held, where they are others.
    """

    profile: Path | None = None
    layers: int | None = None
    max_requests: int = 256
    max_tokens: int = 2048
    kv_tokens: int = 0
    calibrate: Path | None = None
    calibrate_requests: int | None = None
    calibrate_profile: Path | None = None
    calibrate_max_requests: int | None = None
    calibrate_kv_tokens: int | None = None

    def constants(self, machine) -> EngineConstants | None:
        """Fitted to the run that `calibrate` names."""
        if self.calibrate is None:
            for name, value in dataclasses.asdict(self).items():
                if name.startswith("calibrate_") and value is not None:
                    raise ValueError(f"--{name.replace('_', '-')} belongs to --calibrate")
            return None
        run = read_measured(self.calibrate)
        table = read_profile(self.calibrate_profile or self._profile(), layers=self.layers)
        kv = self.kv_tokens if self.calibrate_kv_tokens is None else self.calibrate_kv_tokens
        most = self.calibrate_max_requests
        service, times = measured_engine(
            table, batch=self.max_requests if most is None else most,
            tokens=self.max_tokens, kv_tokens=kv,
        )  # fmt: skip
        return calibrate(run, service, times, machine, self.calibrate_requests)

    def built(self, constants: EngineConstants | None) -> tuple[Service, StepTimes]:
        """The engine that replays the trace."""
        table = read_profile(self._profile(), layers=self.layers)
        return measured_engine(
            table if constants is None else constants.of(table),
            batch=self.max_requests, tokens=self.max_tokens, kv_tokens=self.kv_tokens,
        )  # fmt: skip

    def _profile(self) -> Path:
        if self.profile is None:
            raise ValueError("calibrate needs --profile: the kernel or step times of the engine")
        return self.profile


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Output:
    """Files; the table goes to the terminal.

    Attributes:
      json: Write the result as JSON to this file; `-` is standard output.
      html: Write a page with tables and pictures to this .html.
      per_request: Write a row per request to this .csv or .parquet.
      perfetto: Write a Perfetto (Chrome) trace of the instances to this file.
    """

    json: str | None = None
    html: Path | None = None
    per_request: Path | None = None
    perfetto: Path | None = None


_SPANS = 200_000
"""Busy intervals in a Perfetto trace, at most: some 30 MB."""


@tyro.conf.configure(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """Replay a request trace through prefill, decode and cache pools.

    Attributes:
      trace: Mooncake, Azure, a measured run, a benchmark, token counts or chats, plain or .gz; or
        `poisson:rate=4,requests=1000,prompt=4096,output=256` (also gamma:, constant:).
      slo_ttft_ms: Time to first token that a good request keeps.
      slo_tpot_ms: Time per output token that a good request keeps.
      uncertainty: Of step times, relative: intervals from faster and slower steps (default: the
        prediction's own; 0: none).
    """

    trace: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TRACE")]
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    uncertainty: float | None = None
    offered: Offered = Offered()
    where: Annotated[_Where, tyro.conf.arg(name="what serves")] = _Where()
    engine: Annotated[_Engine, tyro.conf.arg(name="a measured engine")] = _Engine()
    output: _Output = _Output()

    def run(self, console: Console) -> None:
        output = self.output
        check_target(output.json, output.html, output.per_request, output.perfetto)
        if output.html is not None:
            report.check_page(output.html)
        if output.per_request is not None:
            check_suffix(output.per_request)
        found, extra, measured = self._replay()
        result = found.to_dict() | extra
        if output.per_request is not None:
            found.write_requests(output.per_request)
        if output.perfetto is not None:
            found.write_trace(output.perfetto)
        if output.html is not None:
            report.ServingPage(found).write(output.html)
        tables = [report.serving_table(result)]
        if measured:
            result["measured"] = {
                row.key: {"measured": row.measured, "simulated": row.simulated, "error": row.error}
                for row in measured
            }
            tables.append(report.measured_table(measured))
        emit(console, output.json, result, *tables)

    def _replay(self) -> tuple[ServingResult, dict[str, Any], list[Measured]]:
        """The result, what was fitted, and the rows of a trace that was itself measured."""
        where, quiet = self.where, self.output.json == "-"
        deployment: Any = where.deployment
        times = None
        extra: dict[str, Any] = {}
        machine = load_machine(where.on)
        measured = self.engine.profile is not None or self.engine.calibrate is not None
        if measured and deployment is not None:
            raise ValueError("--profile describes an engine; it does not go with --deployment")
        constants = self.engine.constants(machine)
        if measured:
            deployment, times = self.engine.built(constants)
            if constants is not None:
                extra["constants"] = dataclasses.asdict(constants)
        named: dict[str, Any] = {"router": where.router, "admission": where.admission}
        with show_progress("reading", quiet=quiet) as progress:
            trace = self.offered.read(self.trace, progress)
        with show_progress("serving", quiet=quiet) as progress:
            found = serve(
                trace, deployment, machine,
                npus=where.npus,
                slo_ttft_ms=self.slo_ttft_ms,
                slo_tpot_ms=self.slo_tpot_ms,
                cache_blocks=where.cache_blocks,
                clients=self.offered.clients,
                think_s=self.offered.think_s,
                uncertainty=self.uncertainty,
                seed=self.offered.seed,
                record=_SPANS if self.output.perfetto is not None else 0,
                times=times,
                progress=progress,
                **{name: value for name, value in named.items() if value is not None},
            )  # fmt: skip
        rows = []
        if times is not None and is_measured(self.trace):
            run = read_measured(self.trace)
            if run.trace.requests == found.trace.requests:
                rows = compare(run, found)
        return found, extra, rows
