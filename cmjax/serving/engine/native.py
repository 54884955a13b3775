"""The event loop in C++, called through ctypes: `cmjax/native/csrc/serving.h` has the same fields
in the same order."""

import ctypes
from collections.abc import Callable

import numpy as np

from cmjax import native
from cmjax.serving.engine.inputs import EngineInputs
from cmjax.serving.engine.outputs import GAP_BINS, GAUGES, EngineOutputs

_COUNT, _REAL, _ARRAY = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_TABLE_ARRAYS = ("tokens", "length", "requests", "context", "batch_s")
_REQUESTS = ("arrival_s", "prompt", "output", "steps", "growth", "block_start", "block")
_WORKERS = (
    "role", "table", "ranks", "max_requests", "max_tokens", "chunk", "capacity", "waste", "keeps",
    "start_s", "pause_every_s", "pause_s",
)  # fmt: skip


class _Table(ctypes.Structure):
    _fields_ = (
        *((name, _ARRAY) for name in _TABLE_ARRAYS),
        *((f"n_{name}", _COUNT) for name in _TABLE_ARRAYS[:4]),
        ("dense_tokens", _ARRAY), ("dense_s", _ARRAY), ("n_dense", _COUNT),
        ("rows", _ARRAY), ("rows_s", _ARRAY), ("n_rows", _COUNT),
        ("decode_tokens", _COUNT), ("constant_s", _REAL),
    )  # fmt: skip


class _Inputs(ctypes.Structure):
    _fields_ = (
        ("n", _COUNT), *((name, _ARRAY) for name in _REQUESTS),
        ("workers", _COUNT), *((name, _ARRAY) for name in _WORKERS),
        ("stores", _COUNT), ("blocks", _COUNT), ("block_tokens", _COUNT), ("nodes", _COUNT),
        ("node", _ARRAY), ("memory", _ARRAY), ("disk", _ARRAY),
        ("memory_s", _REAL), ("disk_s", _REAL), ("latency_s", _REAL),
        ("n_tables", _COUNT), ("tables", ctypes.POINTER(_Table)),
        ("router", _COUNT), ("admission", _COUNT), ("slo_ttft_s", _REAL), ("decode_limit", _COUNT),
        ("prefill_tokens_per_s", _REAL), ("handover_s", _REAL), ("handover_latency_s", _REAL),
        ("links", _COUNT), ("clients", _COUNT), ("think_s", _REAL),
        ("losses", _COUNT), ("loss_s", _ARRAY), ("loss_worker", _ARRAY), ("back_s", _ARRAY),
        ("bin_s", _REAL), ("record", _COUNT),
    )  # fmt: skip


_OUTPUTS = (
    ("ended", np.int32), ("arrival_s", float), ("scheduled_s", float), ("first_s", float),
    ("decode_s", float), ("last_s", float), ("hit_blocks", np.int64), ("hit_tokens", np.int64),
    ("retries", np.int32), ("prefill_worker", np.int32), ("decode_worker", np.int32),
    ("gaps", np.int64), ("peak_kv", np.int64), ("busy_s", float),
)  # fmt: skip


class _Outputs(ctypes.Structure):
    _fields_ = tuple((name, _ARRAY) for name, _ in _OUTPUTS)


_PROGRESS = ctypes.CFUNCTYPE(ctypes.c_int32, _COUNT)


def available() -> bool:
    return native.function("cmjax_serve_run") is not None


def simulate(given: EngineInputs, progress: Callable[[int], bool] | None = None) -> EngineOutputs:
    """As `Simulation(given).run(progress)`."""
    inputs, kept = _inputs(given)
    count, workers = len(given.requests.arrival_s), len(given.workers.role)
    sizes = {"gaps": GAP_BINS, "peak_kv": workers, "busy_s": workers}
    arrays = {name: np.empty(sizes.get(name, count), dtype) for name, dtype in _OUTPUTS}
    outputs = _Outputs(**{name: array.ctypes.data for name, array in arrays.items()})
    raised: list[BaseException] = []

    def report(ended: int) -> int:
        try:
            return progress is not None and progress(ended)
        except BaseException as error:  # an exception cannot pass through C++
            raised.append(error)
            return 1

    call = native.function("cmjax_serve_run")
    call.restype = ctypes.c_void_p
    grown, bin_s = np.zeros(3, np.int64), np.zeros(1)
    handle = call(
        ctypes.byref(inputs),
        ctypes.byref(outputs),
        _PROGRESS(report),
        grown.ctypes.data_as(_ARRAY),
        bin_s.ctypes.data_as(_ARRAY),
    )
    del kept
    if grown[0] < 0:
        raise MemoryError("serving: the run does not fit into memory")
    if handle is None:
        raise raised[0] if raised else KeyboardInterrupt
    gauges, spans = np.empty(grown[0]), np.empty(grown[1])
    take = native.function("cmjax_serve_take")
    take.restype = None
    take(_ARRAY(handle), gauges.ctypes.data_as(_ARRAY), spans.ctypes.data_as(_ARRAY))
    return EngineOutputs(
        **arrays,
        gauges=gauges.reshape(-1, len(GAUGES)),
        bin_s=float(bin_s[0]),
        spans=spans.reshape(-1, 6),
        events=int(grown[2]),
    )


def hits(given: EngineInputs) -> np.ndarray:
    """Blocks that each request finds in the first store, looked up one after another at once."""
    inputs, kept = _inputs(given)
    found = np.empty(len(given.requests.arrival_s), np.int64)
    call = native.function("cmjax_serve_hits")
    call.restype = None
    call(ctypes.byref(inputs), found.ctypes.data_as(_ARRAY))
    del kept
    return found


def _inputs(given: EngineInputs):
    """The C structure, and what must live as long as it."""
    tables = (_Table * len(given.tables))(*map(_table, given.tables))
    of_cache = ("stores", "blocks", "block_tokens", "memory_s", "disk_s", "latency_s")
    plain = (
        "router", "admission", "slo_ttft_s", "decode_limit", "prefill_tokens_per_s", "handover_s",
        "handover_latency_s", "links", "clients", "think_s", "bin_s", "record",
    )  # fmt: skip
    arrays = {
        **{name: getattr(given.requests, name) for name in _REQUESTS},
        **{name: getattr(given.workers, name) for name in _WORKERS},
        **{name: getattr(given.cache, name) for name in ("node", "memory", "disk")},
        **{name: getattr(given, name) for name in ("loss_s", "loss_worker", "back_s")},
    }
    for name, array in arrays.items():
        assert array.flags.c_contiguous, name
    inputs = _Inputs(
        n=len(given.requests.arrival_s),
        workers=len(given.workers.role),
        nodes=len(given.cache.memory),
        n_tables=len(given.tables),
        tables=tables,
        losses=len(given.loss_s),
        **{name: getattr(given.cache, name) for name in of_cache},
        **{name: getattr(given, name) for name in plain},
        **{name: array.ctypes.data for name, array in arrays.items()},
    )
    return inputs, (tables, arrays)


def _table(table) -> _Table:
    arrays = {name: getattr(table, name) for name in _TABLE_ARRAYS}
    arrays |= {n: getattr(table, n) for n in ("dense_tokens", "dense_s", "rows", "rows_s")}
    assert all(a.flags.c_contiguous and a.dtype == float for a in arrays.values())
    return _Table(
        **{name: array.ctypes.data for name, array in arrays.items()},
        **{f"n_{name}": len(arrays[name]) for name in _TABLE_ARRAYS[:4]},
        n_dense=len(table.dense_tokens),
        n_rows=len(table.rows),
        decode_tokens=table.decode_tokens,
        constant_s=table.constant_s,
    )
