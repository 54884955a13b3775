"""Expert loads: how many tokens each routed expert got, per layer and time window, from a file.

Recorders write many shapes of file; all become one array `[windows, layers, experts]`, and
whatever cannot is refused in one line that names the file, what was found and what is expected.
"""

import csv
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

_KEYS = ("counts", "loads", "expert_popularity", "weight")
_HITS = ("hits", "count", "counts", "load", "loads")
_SHAPES = "[layers, experts] or [windows, layers, experts]"
_SUFFIXES = ".npy, .npz, .csv or .json"


@dataclass(frozen=True, eq=False)
class Loads:
    """Tokens sent to each routed expert.

    Attributes:
      counts: float64 `[windows, layers, experts]`, tokens (or any unit proportional to them);
        read-only. A two-dimensional array is taken as one window.
      source: where the counts are from, for messages and reports.
    Raises: ValueError, one line, for counts that are no loads.
    """

    counts: Float[np.ndarray, "windows layers experts"]
    source: str = "loads"

    def __post_init__(self):
        counts = np.asarray(self.counts)
        if counts.dtype.kind not in "biuf":
            raise ValueError(f"{self.source}: expected numbers, found {counts.dtype} data")
        if counts.ndim not in (2, 3):
            raise ValueError(
                f"{self.source}: expected {_SHAPES}, found an array of shape {counts.shape}"
            )
        if counts.size == 0:
            raise ValueError(f"{self.source}: expected {_SHAPES}, found no counts")
        counts = counts.astype(np.float64).reshape(-1, *counts.shape[-2:])
        for name, bad in (
            ("NaN", np.isnan(counts)),
            ("infinite", np.isinf(counts)),
            ("negative", counts < 0),
        ):
            if bad.any():
                window, layer, expert = np.argwhere(bad)[0]
                raise ValueError(
                    f"{self.source}: expected finite counts of 0 or more, found {bad.sum()} {name} "
                    f"(first: window {window}, layer {layer}, expert {expert})"
                )
        empty = np.argwhere(counts.sum(-1) == 0)
        if len(empty):
            window, layer = empty[0]
            raise ValueError(
                f"{self.source}: expected tokens in every layer, found layer {layer} of window "
                f"{window} all zero"
            )
        counts.flags.writeable = False
        object.__setattr__(self, "counts", counts)

    @property
    def layers(self) -> int:
        return self.counts.shape[1]

    @property
    def experts(self) -> int:
        return self.counts.shape[2]

    def scaled(self, assignments: float) -> "Loads":
        """The same distribution in a step of `assignments` = tokens × top-k per layer."""
        total = self.counts.sum(-1, keepdims=True)
        return Loads(self.counts / total * assignments, self.source)


def read_loads(path: str | Path, *, windows: int = 1, experts: int | None = None) -> Loads:
    """Read expert loads from a file.

    Args:
      path: one of
        `.npy`: an array of shape [layers, experts] or [windows, layers, experts];
        `.npz`: the same, as its only array or named `counts` or `loads` (else `file.npz:key`); or
          token-level routes named `ids`, integers [layers, tokens, top_k] or
          [tokens, layers, top_k] (the longer axis is the tokens), counted per window;
        `.csv`: rows = layers, columns = experts, no header; or long form with the columns layer,
          expert, hits or count, and optionally window (others are ignored);
        `.json`: nested lists of the array shapes, or an object with one of the keys counts, loads,
          expert_popularity, weight; a domain or another key is chosen by `file.json:key`.
      windows: equal stretches of tokens to count separately, for token-level routes only.
      experts: experts per layer, for token-level routes only (default: the largest id + 1, which
        is too few if the last expert is never chosen).
    Raises: ValueError of one line: the file, what was found, what is expected.
    """
    file, key = _split_key(str(path))
    readers = {".npy": _read_npy, ".npz": _read_npz, ".csv": _read_csv, ".json": _read_json}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        found = repr(file.suffix) if file.suffix else "no suffix"
        raise ValueError(f"{path}: expected a {_SUFFIXES} file, found {found}")
    if not file.is_file():
        raise ValueError(f"{path}: expected a {_SUFFIXES} file, found no such file")
    if windows < 1:
        raise ValueError(f"{path}: expected windows of at least 1, found {windows}")
    array = reader(file, key)
    if isinstance(array, _Routes):
        return Loads(_count(array.ids, windows, experts, str(path)), str(path))
    if windows != 1 or experts is not None:
        raise ValueError(
            f"{path}: windows and experts apply to token-level routes (`ids`), found counts"
        )
    return Loads(array, str(path))


@dataclass(frozen=True)
class _Routes:
    """Token-level routes, [layers, tokens, top_k]."""

    ids: Int[np.ndarray, "layers tokens top_k"]


def _split_key(path: str) -> tuple[Path, str | None]:
    chosen = re.fullmatch(r"(.+\.(?:npz|json)):([^/\\]+)", path, re.IGNORECASE)
    return (Path(chosen[1]), chosen[2]) if chosen else (Path(path), None)


def _read_npy(file, key):
    try:
        return np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file}: expected a numeric .npy array, found: {error}") from None


def _read_npz(file, key):
    try:
        with np.load(file, allow_pickle=False) as archive:
            names = list(archive.files)
            if key is None:
                known = [name for name in (*_KEYS, "ids") if name in names]
                if not known and len(names) != 1:
                    raise ValueError(f"found the keys {', '.join(names) or 'none'}")
                key = (known or names)[0]
            elif key not in names:
                raise ValueError(f"found no key {key!r} among {', '.join(names)}")
            array = archive[key]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file}: expected an .npz of one array, or with a key counts or loads, or chosen by "
            f"{file.name}:KEY; {error}"
        ) from None
    return _routes(array, file) if key == "ids" else array


def _routes(ids, file):
    if ids.ndim != 3 or ids.dtype.kind not in "iu" or ids.size == 0 or ids.min() < 0:
        raise ValueError(
            f"{file}: expected ids as integers [layers, tokens, top_k] or [tokens, layers, top_k], "
            f"0 or more, found {ids.dtype} of shape {ids.shape}"
        )
    if ids.shape[0] == ids.shape[1]:
        raise ValueError(
            f"{file}: expected more tokens than layers to tell the axes of ids apart, "
            f"found shape {ids.shape}"
        )
    return _Routes(ids if ids.shape[1] > ids.shape[0] else ids.swapaxes(0, 1))


def _count(ids, windows, experts, source):
    layers, tokens, _ = ids.shape
    found = int(ids.max()) + 1
    experts = found if experts is None else experts
    if found > experts:
        raise ValueError(f"{source}: expected ids below {experts} experts, found {found - 1}")
    if windows > tokens:
        raise ValueError(f"{source}: expected at most {tokens} windows (tokens), found {windows}")
    offset = experts * np.arange(layers)[:, None, None]
    counts = [
        np.bincount((part + offset).ravel(), minlength=layers * experts)
        for part in np.array_split(ids.astype(np.int64), windows, axis=1)
    ]
    return np.stack(counts).reshape(windows, layers, experts)


def _read_csv(file, key):
    try:
        rows = [row for row in csv.reader(file.read_text().splitlines()) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: expected comma-separated text, found: {error}") from None
    if not rows:
        raise ValueError(f"{file}: expected rows of counts, found an empty file")
    header = [cell.strip().lower() for cell in rows[0]]
    if "layer" in header or "expert" in header:
        return _read_long(file, header, rows[1:])
    if len({len(row) for row in rows}) > 1:
        odd = next(n for n, row in enumerate(rows) if len(row) != len(rows[0]))
        raise ValueError(
            f"{file}: expected rows of equal length, found {len(rows[odd])} cells in row {odd + 1} "
            f"and {len(rows[0])} in row 1"
        )
    return np.array([_numbers(row, file, line) for line, row in enumerate(rows, 1)])


def _read_long(file, header, rows):
    hits = next((name for name in _HITS if name in header), None)
    if hits is None or not {"layer", "expert"} <= set(header):
        raise ValueError(
            f"{file}: expected the columns layer, expert, hits or count[, window], "
            f"found {', '.join(header)}"
        )
    names = ["window", "layer", "expert"] if "window" in header else ["layer", "expert"]
    columns = [header.index(name) for name in (*names, hits)]
    cells = []
    for line, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(
                f"{file}: expected {len(header)} cells per row, found {len(row)} in row {line}"
            )
        cells.append(_numbers([row[column] for column in columns], file, line))
    if not cells:
        raise ValueError(f"{file}: expected rows of counts, found only a header")
    table = np.array(cells)
    # Layers (and windows) keep their order but may skip numbers: a file may hold 0, 10, 20 only.
    indices = [np.unique(table[:, n], return_inverse=True)[1] for n in range(len(names) - 1)]
    expert = table[:, -2].astype(np.int64)
    if (expert != table[:, -2]).any() or expert.min() < 0:
        raise ValueError(f"{file}: expected whole expert numbers of 0 or more, found others")
    shape = (*(int(index.max()) + 1 for index in indices), int(expert.max()) + 1)
    flat = np.ravel_multi_index((*indices, expert), shape)
    seen = np.bincount(flat, minlength=int(np.prod(shape)))
    if (seen != 1).any():
        where = np.argwhere(seen != 1)[0, 0]
        at = np.unravel_index(where, shape)
        named = [
            f"{name} {np.unique(table[:, n])[i]:g}"
            for n, (name, i) in enumerate(zip(names[:-1], at, strict=False))
        ]
        raise ValueError(
            f"{file}: expected one row for every layer and expert, found {seen[where]} for "
            f"{', '.join(named)}, expert {at[-1]}"
        )
    counts = np.zeros(len(seen))
    counts[flat] = table[:, -1]
    return counts.reshape(shape)


def _numbers(row, file, line):
    try:
        return [float(cell) for cell in row]
    except ValueError as error:
        raise ValueError(f"{file}: expected numbers, found in row {line}: {error}") from None


def _read_json(file, key):
    try:
        data = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: expected JSON, found: {error}") from None
    data = _choose(data, key, file)
    if not isinstance(data, list):
        raise ValueError(f"{file}: expected nested lists {_SHAPES}, found {_describe(data)}")
    try:
        return np.array(data) if data else np.zeros((0, 0))
    except ValueError:
        raise ValueError(f"{file}: expected {_SHAPES}, found ragged lists") from None


def _choose(data, key, file):
    """The nested lists a JSON document means, following `key` if there is one."""
    if isinstance(data, Mapping):
        counts = next((data[name] for name in _KEYS if name in data), None)
        if key is None:
            data = counts if counts is not None else data
        elif key in data:
            data = data[key]
        elif isinstance(counts, Mapping) and key in counts:
            data = counts[key]
        else:
            raise ValueError(f"{file}: found no key {key!r} in {_describe(data)}")
    elif key is not None:
        raise ValueError(f"{file}: expected an object to choose {key!r} from, found a list")
    data = _listed(data)
    if isinstance(data, Mapping):
        raise ValueError(
            f"{file}: expected nested lists {_SHAPES}, one of the keys {', '.join(_KEYS)}, or a "
            f"choice {file.name}:KEY; found {_describe(data)}"
        )
    return data


def _listed(data):
    """Objects whose keys are 0..n or 1..n as lists in numeric order: layers and experts by name."""
    if isinstance(data, Mapping) and data and all(name.isdecimal() for name in data):
        names = sorted(data, key=int)
        if [int(name) for name in names] in (
            list(range(len(names))),
            list(range(1, len(names) + 1)),
        ):
            return [_listed(data[name]) for name in names]
    return data


def _describe(data):
    return f"the keys {', '.join(data)}" if isinstance(data, Mapping) else f"{type(data).__name__}"
