"""Measured training runs beside their prices: reads the tables of vTrain, Megatron and others.

A row names a GPT's sizes, its degrees and what was measured: `iteration_ms`, `tflops_per_gpu` (by
Megatron's count of 96 B s L h^2 (1 + s / (6 h) + V / (16 L h)) FLOP), or `full_recompute_s` and
`selective_sequence_parallel_s`, which make two rows.

Rows are priced as the frameworks that they are of run them: PyTorch's checkpoint computes the whole
of a layer again, and stages are furthest apart. No constant is fitted to rows, but the rates of the
A100 machines were chosen, among published micro-benchmarks, after some rows had been seen.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from cmjax.hardware import Supernode
from cmjax.inputs import check_count, read_csv, shown
from cmjax.models.dense import DenseConfig
from cmjax.parallelism.eager import Eager
from cmjax.parallelism.memory import fits, memory_of
from cmjax.parallelism.plan import Plan
from cmjax.parallelism.search import CHUNKS, MICRO_BATCHES, check_devices, price_anyway

VOCABULARY = 51_200
"""GPT-2's vocabulary, padded: taken where a row has none."""

ORDER = ("tensor", "data", "pipeline")
"""Megatron's and DeepSpeed's ranks: stages are furthest apart (`mpu/initialize.py` of the one,
`PipeModelDataParallelTopology` of the other)."""

_NEEDED = ("hidden", "heads", "layers", "sequence", "tensor", "pipeline", "global_batch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """A row: its place in the file, the model, the plan, seconds measured and predicted."""

    line: int
    model: DenseConfig
    plan: Plan
    global_batch: int
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Relative, positive where the prediction is too slow."""
        return self.predicted_s / self.measured_s - 1

    def to_dict(self) -> dict[str, object]:
        return {
            "line": self.line,
            "plan": str(self.plan),
            "layers": self.model.layers,
            "hidden": self.model.hidden,
            "devices": self.plan.devices,
            "global_batch": self.global_batch,
            "measured_s": self.measured_s,
            "predicted_s": self.predicted_s,
            "error": self.error,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows that could be priced, and why others could not: `line N: reason`."""

    rows: tuple[MeasuredRow, ...]
    skipped: tuple[str, ...]

    @property
    def mean_error(self) -> float:
        """Mean of the errors' sizes."""
        return float(np.mean([abs(row.error) for row in self.rows]))

    @property
    def worst_error(self) -> float:
        return max(abs(row.error) for row in self.rows)

    @property
    def kendall_tau(self) -> float | None:
        """Rank correlation of the plans of one model at one number of devices and global batch; the
        mean over such groups of three rows or more by their size, `None` without any."""
        groups: dict[tuple, list[MeasuredRow]] = {}
        for row in self.rows:
            key = (row.model, row.plan.devices, row.global_batch)
            groups.setdefault(key, []).append(row)
        found = []
        for rows in (rows for rows in groups.values() if len(rows) >= 3):
            tau: Any = kendalltau([r.measured_s for r in rows], [r.predicted_s for r in rows])
            if np.isfinite(tau.statistic):
                found.append((float(tau.statistic), len(rows)))
        if not found:
            return None
        return sum(tau * count for tau, count in found) / sum(count for _, count in found)

    def to_dict(self) -> dict[str, object]:
        return {
            "rows": [row.to_dict() for row in self.rows],
            "skipped": list(self.skipped),
            "mean_error": self.mean_error,
            "worst_error": self.worst_error,
            "kendall_tau": self.kendall_tau,
        }


def compare(path: Path, machine: Supernode) -> Comparison:
    """Price every row of a file.

    Raises: ValueError: a file that cannot be read or has no row that can be priced.
    """
    table = read_csv(path)
    names = [name.strip() for name in table[0][1]] if table else []
    if missing := [name for name in _NEEDED if name not in names]:
        raise ValueError(
            f"{path}: no row can be priced: no column {missing[0]}; expected {', '.join(_NEEDED)} "
            "and what was measured"
        )
    rows, skipped = [], []
    for line, cells in table[1:]:
        try:
            if len(cells) != len(names):
                raise ValueError(f"expected {len(names)} cells, found {len(cells)}")
            rows += list(_priced(line, dict(zip(names, cells, strict=True)), machine))
        except ValueError as error:
            skipped.append(f"line {line}: {error}")
    if not rows:
        why = f"; {skipped[0]}" if skipped else ""
        raise ValueError(f"{path}: no row can be priced{why}")
    return Comparison(rows=tuple(rows), skipped=tuple(skipped))


def _priced(line: int, row: Mapping[str, str], machine: Supernode) -> Iterator[MeasuredRow]:
    model, batch = _model(row), _count(row, "global_batch")
    tensor, pipeline = _count(row, "tensor"), _count(row, "pipeline")
    devices = _count(row, "gpus", _count(row, "data", 1) * tensor * pipeline)
    data = _count(row, "data", devices // (tensor * pipeline))
    if data * tensor * pipeline != devices:
        raise ValueError(
            f"data {data} x tensor {tensor} x pipeline {pipeline} is not {devices} GPUs"
        )
    check_devices(devices, machine)
    eager = Eager(overlaps=not row.get("iteration_ms") and not row.get("tflops_per_gpu"))
    for plan, measured in _measured(row, model, batch, devices, data, tensor, pipeline):
        options = list(_completed(plan, row, model, batch, machine))
        found = min(
            (price_anyway(model, machine, option, batch, eager=eager) for option in options),
            key=lambda priced: priced.step_s,
        )
        yield MeasuredRow(
            line=line, model=model, plan=found.plan, global_batch=batch,
            measured_s=measured, predicted_s=found.step_s,
        )  # fmt: skip


def _measured(
    row, model: DenseConfig, batch: int, devices, data, tensor, pipeline
) -> Iterator[tuple[Plan, float]]:
    plan = Plan(data=data, tensor=tensor, pipeline=pipeline, recompute="full", order=ORDER)
    if row.get("iteration_ms"):
        yield plan, _number(row, "iteration_ms") / 1e3
    elif row.get("tflops_per_gpu"):
        b, s, h, n, v = batch, model.sequence, model.hidden, model.layers, model.vocab
        flops = 96 * b * s * n * h**2 * (1 + s / (6 * h) + v / (16 * n * h))
        yield plan, flops / (devices * _number(row, "tflops_per_gpu") * 1e12)
    elif row.get("full_recompute_s") or row.get("selective_sequence_parallel_s"):
        if row.get("full_recompute_s"):
            yield plan, _number(row, "full_recompute_s")
        if row.get("selective_sequence_parallel_s"):
            selective = dataclasses.replace(plan, recompute="selective", sequence_parallel=True)
            yield selective, _number(row, "selective_sequence_parallel_s")
    else:
        raise ValueError(
            "nothing measured: expected iteration_ms, tflops_per_gpu, or full_recompute_s"
        )


def _completed(
    plan: Plan, row, model: DenseConfig, batch: int, machine: Supernode
) -> Sequence[Plan]:
    """The row's plan, or, where it does not say the micro-batch or the chunks, all that fit."""
    chunks = [_count(row, "interleave")] if row.get("interleave") else [1]
    if not row.get("interleave") and not row.get("iteration_ms") and plan.pipeline > 1:
        chunks += CHUNKS
    sizes = [_count(row, "micro_batch")] if row.get("micro_batch") else list(MICRO_BATCHES)
    options, wrong = [], None
    for size in sizes:
        for chunk in chunks:
            schedule = "interleaved" if chunk > 1 else "1f1b"
            option = dataclasses.replace(
                plan, micro_batch=size, interleave=chunk, schedule=schedule
            )
            try:
                option.check(model, batch)
            except ValueError as error:
                wrong = error
                continue
            options.append(option)
    if not options:
        raise wrong or ValueError("no plan")
    fitting = [option for option in options if fits(memory_of(model, option, batch), machine)]
    return fitting or options[:1]  # a run that was measured did fit


def _model(row: Mapping[str, str]) -> DenseConfig:
    hidden = _count(row, "hidden")
    return DenseConfig(
        layers=_count(row, "layers"),
        hidden=hidden,
        heads=_count(row, "heads"),
        ffn=_count(row, "ffn", 4 * hidden),
        vocab=_count(row, "vocab", VOCABULARY),
        sequence=_count(row, "sequence"),
        dropout=0.1,
    )


def _count(row: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = (row.get(name) or "").strip()
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdecimal()) or len(text) > 15 or int(text) < 1:
        raise ValueError(f"column {name} must be a whole number >= 1, got {shown(text)}")
    value = int(text)
    check_count(f"column {name}", value)
    return value


def _number(row: Mapping[str, str], name: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ValueError(f"column {name} must be a positive number, got {shown(row[name])}")
    return value
