"""Step times that were measured: a CSV of steps, or a folder with the kernel times of one layer.

A CSV has the columns prefill_tokens, prefill_length, decode_requests, decode_context and step_ms:
a full grid of steps of one instance, decode requests per data-parallel rank. What the columns mean
stands in `cmjax.serving.engine.table`.

A folder has attention.csv (prefill_chunk, kv_prefill, n_decode, kv_decode, time_us), dense.csv
(layer, tokens, time_us) and per_sequence.csv (layer, sequences, time_us), as LLMServingSim's
profiler writes them: kernels of one layer on one GPU.
"""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cmjax.inputs import read_records
from cmjax.serving.engine.table import Table

_MOST_STEPS = 2**22
_STEPS = ("prefill_tokens", "prefill_length", "decode_requests", "decode_context", "step_ms")
_ONCE = ("embedding", "final_layernorm")  # per step, not per layer
_TWICE = ("layernorm",)  # before attention and before the feed-forward network
_GRAPH_SIZES = np.array([1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)], float)
"""Tokens of a step that vLLM captures as a CUDA graph; a step is padded to the next one."""


def read_profile(source: str | Path, *, layers: int | None = None) -> Table:
    """Read measured step times.

    Args:
      source: a CSV of steps, or a folder of kernel times. layers: of the model, for a folder.
    Raises: ValueError: a missing file, column or point of the grid; layers missing or not needed.
    """
    path = Path(source)
    if path.is_dir():
        if layers is None or layers < 1:
            raise ValueError(
                f"{path}: kernel times are of one layer; say how many layers there are"
            )
        return _kernels(path, layers)
    if not path.is_file():
        raise ValueError(f"{source}: no such profile, neither a CSV file nor a folder")
    return _steps(path)


def _steps(path: Path) -> Table:
    rows = _rows(path, _STEPS)
    points = {row[:4]: row[4] * 1e-3 for row in rows}
    if len(points) < len(rows):
        twice = next(row for row, after in itertools.pairwise(sorted(rows)) if row[:4] == after[:4])
        raise ValueError(f"{path}: two steps of {_said(twice)}")
    axes = [np.unique([point[i] for point in points]) for i in range(4)]
    _check_grid(path, *axes)
    values = np.empty([len(axis) for axis in axes])
    for index in np.ndindex(*values.shape):
        point = tuple(float(axis[i]) for axis, i in zip(axes, index, strict=True))
        if point not in points:
            if point[0] == point[2] == 0:
                values[index] = 0.0  # a step of nothing
                continue
            raise ValueError(f"{path}: the grid has no step of {_said(point)}")
        values[index] = points[point]
        if values[index] < 0 or (values[index] == 0 and (point[0] or point[2])):
            raise ValueError(
                f"{path}: step_ms {values[index] * 1e3:g} of {_said(point)}; steps take time"
            )
    return Table(tokens=axes[0], length=axes[1], requests=axes[2], context=axes[3], batch_s=values)


def _said(point: tuple[float, ...]) -> str:
    return ", ".join(f"{n} {v:g}" for n, v in zip(_STEPS[:4], point, strict=False))


def _kernels(path: Path, layers: int) -> Table:
    dense = _by_layer(path / "dense.csv", "tokens")
    for name in path.glob("moe*.csv"):
        raise ValueError(f"{name}: kernel times of experts are not read yet; give a CSV of steps")
    tokens = np.unique(np.concatenate([_GRAPH_SIZES, np.arange(1.0, 513.0), *_nodes(dense)]))
    padded = _padded(tokens)
    seconds = np.zeros_like(tokens)
    for name, (nodes, times) in dense.items():
        count = 1 if name in _ONCE else layers * (2 if name in _TWICE else 1)
        seconds += count * np.interp(padded, nodes, times)
    once = _by_layer(path / "per_sequence.csv", "sequences")
    rows = np.unique(np.concatenate(_nodes(once)))
    rows_s = np.sum([np.interp(rows, *of) for of in once.values()], axis=0)
    return _attention(
        path / "attention.csv",
        layers,
        dense_tokens=tokens,
        dense_s=seconds,
        rows=rows,
        rows_s=rows_s,
    )


def _padded(tokens: np.ndarray) -> np.ndarray:
    """Tokens of a step as its graph has them."""
    at = np.searchsorted(_GRAPH_SIZES, tokens)
    return np.where(
        at < len(_GRAPH_SIZES), _GRAPH_SIZES[np.minimum(at, len(_GRAPH_SIZES) - 1)], tokens
    )


def _attention(path: Path, layers: int, **others) -> Table:
    """From (chunk, cached tokens before it) to (tokens, length): a chunk of T tokens behind k has
    length 2 k + T. Shorter lengths are several prompts, T / L of them, each a chunk of L.

    The kernels of a chunk and those of the requests that decode beside it follow one another: each
    is taken as it was measured alone, as a launch for all of a step splits no long context.
    """
    points = {row[:4]: row[4] * 1e-6 * layers for row in _rows(
        path, ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
    )}  # fmt: skip
    chunk, cached, requests, context = (np.unique([p[i] for p in points]) for i in range(4))
    lengths = np.unique(np.concatenate([chunk, 2 * cached + chunk.max()]))
    lengths = lengths[lengths > 0]
    _check_grid(path, chunk, np.append(cached, lengths), requests, context)
    context = context[context > 0]
    decode = np.array([[points.get((0.0, 0.0, n, c), 0.0) for c in context] for n in requests])

    def prefill(t: float, length: float) -> float:
        if t == 0:
            return 0.0
        if length < t:
            return t / length * points[length, 0.0, 0.0, 0.0]
        known = np.array([k for k in cached if (t, k, 0.0, 0.0) in points])
        seconds = np.array([points[t, k, 0.0, 0.0] for k in known])
        return float(_along(known, seconds, (length - t) / 2))

    values = np.array([[prefill(t, length) for length in lengths] for t in chunk])
    return Table(
        tokens=chunk, length=lengths, requests=requests, context=context,
        batch_s=values[:, :, None, None] + decode, **others,
    )  # fmt: skip


def _check_grid(path: Path, *axes: np.ndarray) -> None:
    """Raise ValueError for steps that lie on no grid but anywhere."""
    count = math.prod(map(len, axes))
    if count > _MOST_STEPS:
        raise ValueError(
            f"{path}: {' x '.join(str(len(axis)) for axis in axes)} values are a grid of {count:,} "
            f"steps; at most {_MOST_STEPS:,} are read"
        )


def _along(nodes: np.ndarray, values: np.ndarray, x: float) -> np.ndarray:
    """Linear along the first axis; beyond the last node the last slope goes on."""
    if len(nodes) == 1:
        return values[0]
    i = int(np.clip(np.searchsorted(nodes, x, side="right") - 1, 0, len(nodes) - 2))
    part = (x - nodes[i]) / (nodes[i + 1] - nodes[i])
    return values[i] + part * (values[i + 1] - values[i])


def _by_layer(path: Path, size: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sizes and seconds of every kernel."""
    found: dict[str, dict[float, float]] = {}
    for record in _records(path, ("layer", size, "time_us")):
        found.setdefault(record["layer"], {})[float(record[size])] = float(record["time_us"]) * 1e-6
    return {
        n: (np.array(sorted(at)), np.array([at[x] for x in sorted(at)])) for n, at in found.items()
    }


def _nodes(layers: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    return [nodes for nodes, _ in layers.values()]


def _rows(path: Path, columns: tuple[str, ...]) -> list[tuple[float, ...]]:
    return [tuple(float(r[c]) for c in columns) for r in _records(path, columns)]


def _records(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    numbered = read_records(path, columns)
    for line, record in numbered:
        for column in columns:
            if column != "layer" and not _is_number(record[column]):
                raise ValueError(f"{path} line {line}: {column} is no number: {record[column]!r}")
    return [record for _, record in numbered]


def _is_number(text: str | None) -> bool:
    try:
        return text is not None and np.isfinite(float(text))
    except ValueError:
        return False
