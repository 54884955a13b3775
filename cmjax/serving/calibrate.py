"""Engine constants from a measured run: what kernel times alone do not say.

    step_s = kernels x kernel_scale + host_s + sequence_s x sequences + token_s x tokens

Host time and launches are paid per step; per sequence the engine samples and detokenizes; per token
parallel ranks exchange activations, where the profile has no exchange in it. The four are fitted by
least squares to the measured first and last tokens of every request, through the simulator.
"""

import dataclasses
from pathlib import Path

import numpy as np
import scipy  # its parts are imported with their first use
from jaxtyping import Float64

from cmjax.hardware import Supernode
from cmjax.inputs import check_count, read_text
from cmjax.serving.assemble import Replay
from cmjax.serving.engine.table import Table
from cmjax.serving.metrics import PERCENTILES
from cmjax.serving.result import ServingResult
from cmjax.serving.serve import simulate
from cmjax.serving.service import ColocatedPool, Service
from cmjax.serving.step_times import StepTimes
from cmjax.serving.traces import Trace, read_trace
from cmjax.serving.traces.columns import json_record

_NEEDED = ("queued_ts", "first_token_ts", "last_token_ts")
_STARTS = ((1e-4, 1e-6, 1e-6), (1e-3, 3e-5, 3e-5), (3e-3, 1e-4, 1e-6))
# Relative steps of finite differences: the simulated times have small jumps.
_SLOPES = (0.03, 0.003)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConstants:
    """What a step takes besides its kernels; see the module."""

    host_s: float = 0.0
    sequence_s: float = 0.0
    token_s: float = 0.0
    kernel_scale: float = 1.0

    def of(self, table: Table) -> Table:
        """Step times with these constants."""
        tokens = table.dense_tokens if table.dense_tokens.size else np.array([0.0, 1.0])
        dense_s = table.dense_s if table.dense_s.size else np.zeros(2)
        rows = table.rows if table.rows.size else np.array([0.0, 1.0])
        rows_s = table.rows_s if table.rows_s.size else np.zeros(2)
        return dataclasses.replace(
            table,
            batch_s=table.batch_s * self.kernel_scale,
            dense_tokens=tokens,
            dense_s=dense_s * self.kernel_scale + self.token_s * tokens,
            rows=rows,
            rows_s=rows_s * self.kernel_scale + self.sequence_s * rows,
            constant_s=table.constant_s * self.kernel_scale + self.host_s,
        )


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
    """Read JSON lines with `queued_ts`, `first_token_ts`, `last_token_ts` (s) and token counts.

    Raises: ValueError: a field that is missing, or a request that ends before it starts, named.
    """
    trace = read_trace(path)
    times = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        record = json_record(line)
        missing = [name for name in _NEEDED if not isinstance(record.get(name), int | float)]
        if missing:
            raise ValueError(f"{path} line {number}: no time {missing[0]}; a measured run has it")
        queued, first, last = (float(record[name]) for name in _NEEDED)
        if not queued <= first <= last:
            raise ValueError(f"{path} line {number}: queued, first and last token are not in order")
        times.append((first - queued, last - queued))
    ttft, e2e = np.array(times).T
    return MeasuredRun(trace=trace, ttft_s=ttft, e2e_s=e2e)


def is_measured(path: str | Path) -> bool:
    """Whether a file's first line has the times of a measured run."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b'"first_token_ts"' in file.readline()


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
    run: MeasuredRun, service: Service, times: StepTimes, machine: Supernode
) -> EngineConstants:
    """Fit the constants of a colocated engine to a measured run."""

    first_s, last_s = run.ttft_s.mean(), run.e2e_s.mean()

    def errors(x: np.ndarray) -> np.ndarray:
        """Of every request; the scale of the kernels is held near 1, as nothing else is known."""
        found = replayed(run, service, times, machine, _constants(x)).latencies
        parts = (
            (found.ttft - run.ttft_s) / first_s,
            (found.e2e - run.e2e_s) / last_s,
            np.nan_to_num(found.tpot / run.tpot_s - 1),
        )
        return np.append(np.concatenate(parts) / np.sqrt(run.trace.requests), 0.3 * (x[3] - 1))

    bounds = (np.zeros(4), np.full(4, np.inf))
    fits = [
        scipy.optimize.least_squares(
            errors, [*start, 1.0], bounds=bounds, x_scale=[1e-3, 1e-5, 1e-5, 0.1], diff_step=step,
        )
        for start in _STARTS
        for step in _SLOPES
    ]  # fmt: skip
    best = min(fits, key=lambda fit: fit.cost)
    polished = scipy.optimize.minimize(
        lambda logs: float((errors(np.exp(logs)) ** 2).sum()), np.log(np.maximum(best.x, 1e-9)),
        method="Nelder-Mead", options={"maxfev": 600, "xatol": 1e-3, "fatol": 1e-10},
    )  # fmt: skip
    return _constants(np.exp(polished.x) if polished.fun < 2 * best.cost else best.x)


def _constants(x: np.ndarray) -> EngineConstants:
    host, sequence, token, scale = x.tolist()
    return EngineConstants(host_s=host, sequence_s=sequence, token_s=token, kernel_scale=scale)


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
