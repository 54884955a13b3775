"""Engine constants from a measured run: what kernel times alone do not say.

    step_s = kernels x kernel_scale + host_s + sequence_s x sequences + token_s x tokens
             + launch_s, of a step that prefills

Host time is paid per step; per sequence the engine samples and detokenizes. A step that only
decodes replays one CUDA graph; one that prefills is launched piece by piece. Per token, tensor-
parallel ranks exchange activations, where the profile has no exchange in it: two all-reduces a
layer of tokens x hidden values. The five are fitted by least squares to the measured first and last
tokens of requests, through the simulator. The first request is left out: engines warm up on it.
"""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import scipy  # its parts are imported with their first use
from jaxtyping import Float64

from cmjax.hardware import Supernode
from cmjax.inputs import check_count
from cmjax.serving.assemble import Replay
from cmjax.serving.engine.table import Table
from cmjax.serving.metrics import PERCENTILES
from cmjax.serving.result import ServingResult
from cmjax.serving.serve import simulate
from cmjax.serving.service import ColocatedPool, Service
from cmjax.serving.step_times import StepTimes
from cmjax.serving.traces import Trace, read_trace
from cmjax.serving.traces.columns import json_record
from cmjax.serving.traces.documents import opened, records

_NEEDED = ("queued_ts", "first_token_ts", "last_token_ts")
_STARTS = (
    (1e-4, 1e-3, 1e-6, 1e-6, 1.0), (1e-3, 8e-3, 1e-6, 1e-5, 1.0), (2e-3, 2e-3, 2e-5, 1e-4, 1.0),
)  # fmt: skip
_EVALUATIONS, _UNFOLDED = 250, 3
_LEAST = (1e-5, 1e-4, 1e-8, 1e-8, 0.5)
"""Where a constant that was fitted to be nothing is taken up again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConstants:
    """What a step takes besides its kernels; see the module."""

    host_s: float = 0.0
    launch_s: float = 0.0
    sequence_s: float = 0.0
    token_s: float = 0.0
    kernel_scale: float = 1.0

    def of(self, table: Table) -> Table:
        """Step times with these constants."""
        tokens = table.dense_tokens if table.dense_tokens.size else np.array([0.0, 1.0])
        dense_s = table.dense_s if table.dense_s.size else np.zeros(2)
        rows = table.rows if table.rows.size else np.array([0.0, 1.0])
        rows_s = table.rows_s if table.rows_s.size else np.zeros(2)
        prompts, batch_s = self._launched(table)
        return dataclasses.replace(
            table,
            tokens=prompts,
            batch_s=batch_s * self.kernel_scale
            + self.launch_s * (prompts > 0).reshape(-1, 1, 1, 1),
            dense_tokens=tokens,
            dense_s=dense_s * self.kernel_scale + self.token_s * tokens,
            rows=rows,
            rows_s=rows_s * self.kernel_scale + self.sequence_s * rows,
            constant_s=table.constant_s * self.kernel_scale + self.host_s,
        )

    @staticmethod
    def _launched(table: Table) -> tuple[np.ndarray, np.ndarray]:
        """The table's prompt tokens and times with a node at one token, from which on a step is one
        that prefills."""
        tokens, batch_s = table.tokens, table.batch_s
        if len(tokens) == 1 or not tokens[0] < 1 < tokens[1]:
            return tokens, batch_s
        part = (1 - tokens[0]) / (tokens[1] - tokens[0])
        one = batch_s[:1] + part * (batch_s[1:2] - batch_s[:1])
        return np.insert(tokens, 1, 1.0), np.concatenate([batch_s[:1], one, batch_s[1:]])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredRun:
    """A run of a real engine, request by request.

    Fields:
      trace: what arrived. ttft_s, e2e_s: from the engine's queue to the first and the last token.
    """

    trace: Trace
    ttft_s: Float64[np.ndarray, "requests"]
    e2e_s: Float64[np.ndarray, "requests"]

    @property
    def tpot_s(self) -> Float64[np.ndarray, "requests"]:
        """Seconds per output token after the first; NaN for a single one."""
        gaps = np.where(self.trace.output > 1, self.trace.output - 1, np.nan)
        return (self.e2e_s - self.ttft_s) / gaps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One number of a run: seconds measured and simulated."""

    key: str
    measured: float
    simulated: float

    @property
    def error(self) -> float:
        """Relative, signed."""
        return self.simulated / self.measured - 1


def read_measured(path: str | Path) -> MeasuredRun:
    """Read JSON lines with `queued_ts`, `first_token_ts`, `last_token_ts` (s) and token counts, or
    a benchmark's result with `start_times`, `ttfts` and `itls`.

    Raises: ValueError: a field that is missing, or a request that ends before it starts, named.
    """
    trace = read_trace(path)
    times = []
    with opened(Path(path)) as (file, _):
        for where, line in records(file):
            record = json_record(line)
            missing = [name for name in _NEEDED if not isinstance(record.get(name), int | float)]
            if missing:
                raise ValueError(f"{path} {where}: no time {missing[0]}; a measured run has it")
            queued, first, last = (float(record[name]) for name in _NEEDED)
            if not queued <= first <= last:
                raise ValueError(f"{path} {where}: queued, first and last token are not in order")
            times.append((first - queued, last - queued))
    ttft, e2e = np.array(times).T
    return MeasuredRun(trace=trace, ttft_s=ttft, e2e_s=e2e)


def is_measured(path: str | Path) -> bool:
    """Whether a file's first record has the times of a measured run."""
    path = Path(path)
    if not path.is_file():
        return False
    with opened(path) as (file, _):
        return any(b'"first_token_ts"' in line for _, line in itertools.islice(records(file), 1))


def measured_engine(
    table: Table, *, batch: int, tokens: int = 2048, kv_tokens: int = 0, page: int = 16
) -> tuple[Service, StepTimes]:
    """One engine with continuous batching and chunked prefill, as vLLM's options describe it.

    Args:
      table: its step times. batch: `max_num_seqs`. tokens: `max_num_batched_tokens`.
      kv_tokens: of its cache; 0 is more than it needs. page: `block_size`.
    """
    check_count("max-requests", batch)
    check_count("max-tokens", tokens)
    check_count("kv-tokens", kv_tokens, least=0)
    service = Service(name="engine", colocated=ColocatedPool(npus=1, tokens=tokens, batch=batch))
    times = StepTimes(
        tables={"colocated": table}, ranks={"colocated": 1}, kv_tokens={"colocated": kv_tokens},
        kv_token_bytes=1.0, page=page, source="measured kernel times",
    )  # fmt: skip
    return service, times


def calibrate(
    run: MeasuredRun, service: Service, times: StepTimes, machine: Supernode,
    requests: int | None = None,
) -> EngineConstants:  # fmt: skip
    """Fit the constants of a colocated engine to a measured run.

    Args:
      run: measured. service, times: the engine without constants, from `measured_engine`.
      machine: that the engine's exchanges would go over; nothing of it enters a colocated engine.
      requests: fit to the first so many only, so that the others are predicted; `None` is all.
    Raises: ValueError: fewer than two requests to fit to.
    """
    count = run.trace.requests if requests is None else min(requests, run.trace.requests)
    check_count("calibrate-requests", count, least=2)
    fitted = slice(1, count)
    first_s, last_s = run.ttft_s[fitted].mean(), run.e2e_s[fitted].mean()

    def misfit(logs: np.ndarray) -> float:
        """Mean square over requests; the scale of the kernels is held near 1, as nothing else is
        known of it."""
        constants = _constants(np.exp(logs))
        found = replayed(run, service, times, machine, constants).latencies
        parts = (
            (found.ttft - run.ttft_s) / first_s,
            (found.e2e - run.e2e_s) / last_s,
            np.nan_to_num(found.tpot / run.tpot_s - 1),
        )
        squares = sum(float((part[fitted] ** 2).sum()) for part in parts)
        return squares / (count - 1) + (0.3 * (constants.kernel_scale - 1)) ** 2

    def descended(logs: np.ndarray) -> scipy.optimize.OptimizeResult:
        options = {"maxfev": _EVALUATIONS, "xatol": 1e-3, "fatol": 1e-9}
        return scipy.optimize.minimize(misfit, logs, method="Nelder-Mead", options=options)

    # Simulated times jump where a batch forms a step earlier, so no slopes are taken; a simplex
    # that has collapsed on such a jump is unfolded again.
    best = min((descended(np.log(start)) for start in _STARTS), key=lambda fit: fit.fun)
    for _ in range(_UNFOLDED):
        best = descended(np.maximum(best.x, np.log(_LEAST)))
    return _constants(np.exp(best.x))


def _constants(x: np.ndarray) -> EngineConstants:
    host, launch, sequence, token, scale = x.tolist()
    return EngineConstants(
        host_s=host, launch_s=launch, sequence_s=sequence, token_s=token, kernel_scale=scale
    )


def replayed(
    run: MeasuredRun, service: Service, times: StepTimes, machine: Supernode,
    constants: EngineConstants | None = None,
) -> ServingResult:  # fmt: skip
    """The run, simulated."""
    if constants is not None:
        tables = {name: constants.of(table) for name, table in times.tables.items()}
        times = dataclasses.replace(times, tables=tables)
    return simulate(run.trace, service, machine, times, Replay())


def compare(run: MeasuredRun, found: ServingResult) -> list[Measured]:
    """Mean and percentiles of TTFT and TPOT, measured and simulated."""
    rows = []
    for key, measured, simulated in (
        ("ttft", run.ttft_s, found.latencies.ttft),
        ("tpot", run.tpot_s, found.latencies.tpot),
    ):
        for name, of in _statistics():
            rows.append(Measured(
                key=f"{key}_{name}_ms", measured=of(measured) * 1e3, simulated=of(simulated) * 1e3
            ))  # fmt: skip
    return rows


def _statistics():
    yield "mean", lambda x: float(np.nanmean(x))
    for p in PERCENTILES:
        yield f"p{p}", lambda x, p=p: float(np.nanpercentile(x, p))
