"""Recordings as comma-separated text: rows of layers, or one row per layer and expert."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmjax.inputs import check_count
from cmjax.inputs import read_csv as read_rows
from cmjax.placement.files.readers.scenario import Counts, NoRecordingError, Scenarios
from cmjax.placement.loads import MOST_COUNTS, check_sizes

_HITS = ("hits", "count", "counts", "load", "loads")
_RENAMED = {"layer_id": "layer", "expert_id": "expert"}  # as SGLang's older recorder writes them


def read_csv(file: Path, key: str | None, experts: int | None) -> Scenarios:
    """A table without header (rows = layers, columns = experts), or long form with the columns
    layer, expert, hits or count, and optionally window and domain; other columns are ignored. With
    the columns layer_id, expert_id, count, a missing row is a count of 0.

    Raises: NoRecordingError for a table with other columns; ValueError for ragged, missing,
      repeated or unreadable cells.
    """
    rows = _rows(file)
    header = [" ".join(cell.split()).lower() for cell in rows[0]]
    if not {"layer", "expert", *_RENAMED}.isdisjoint(header):
        named = [_RENAMED.get(name, name) for name in header]
        return _read_long(file, named, rows[1:], missing=named != header)
    if not any(_is_number(cell) for cell in rows[0]):
        raise NoRecordingError(
            f"{file}: expected the columns layer, expert, hits or count[, window, domain], "
            f"found {', '.join(header)}"
        )
    if len({len(row) for row in rows}) > 1:
        odd = next(n for n, row in enumerate(rows) if len(row) != len(rows[0]))
        raise ValueError(
            f"{file}: expected rows of equal length, found {len(rows[odd])} cells in row {odd + 1} "
            f"and {len(rows[0])} in row 1"
        )
    counts = np.array([_numbers(row, file, line) for line, row in enumerate(rows, 1)])
    return {"": Counts(counts, str(file))}


def document_categories(file: Path) -> dict[int, str] | None:
    """The category of every document of a `docs.csv`; None where there is no such file.

    Raises: ValueError if it lacks the columns doc and category.
    """
    if not file.is_file():
        return None
    header, *rows = _rows(file)
    if not {"doc", "category"} <= set(header):
        raise ValueError(
            f"{file}: expected the columns doc and category, found {', '.join(header)}"
        )
    doc, category = header.index("doc"), header.index("category")
    try:
        return {int(row[doc]): row[category] for row in rows}
    except (ValueError, IndexError) as error:
        raise ValueError(f"{file}: expected a number and a category per row: {error}") from None


def _rows(file):
    rows = [cells for _, cells in read_rows(file)]
    if not rows:
        raise ValueError(f"{file}: expected rows of counts, found an empty file")
    return rows


def long_scenarios(rows: Sequence[Mapping[str, Any]], file: Path) -> Scenarios:
    """Workloads of objects with layer, expert and count each, and optionally window and domain; a
    missing object is a count of 0.

    Raises: NoRecordingError for objects with other names.
    """
    names = [_RENAMED.get(name, name) for name in rows[0]]
    keys = list(rows[0])
    odd = next((n for n, row in enumerate(rows) if list(row) != keys), None)
    if odd is not None and {"layer", "expert"} <= set(names):
        raise ValueError(f"{file}: expected the keys {', '.join(keys)} in row {odd + 1}")
    cells = [[str(row.get(key, "")) for key in keys] for row in rows]
    return _read_long(file, names, cells, missing=True)


def _read_long(file, header, rows, *, missing=False):
    hits = next((name for name in _HITS if name in header), None)
    if hits is None or not {"layer", "expert"} <= set(header):
        raise (ValueError if {"layer", "expert"} & set(header) else NoRecordingError)(
            f"{file}: expected the columns layer, expert, hits or count[, window, domain], "
            f"found {', '.join(header)}"
        )
    twice = [name for name in ("window", "layer", "expert", hits) if header.count(name) > 1]
    if twice:
        raise ValueError(f"{file}: expected the column {twice[0]} once, found it twice")
    names = ["window", "layer", "expert"] if "window" in header else ["layer", "expert"]
    columns = [header.index(name) for name in (*names, hits)]
    domain = header.index("domain") if "domain" in header else None
    cells: dict[str, list] = {}
    for line, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(
                f"{file}: expected {len(header)} cells per row, found {len(row)} in row {line}"
            )
        of = "" if domain is None else row[domain].strip()
        cells.setdefault(of, []).append(_numbers([row[n] for n in columns], file, line))
    if not cells:
        raise ValueError(f"{file}: expected rows of counts, found only a header")
    return {
        of: _long_loads(np.array(table), names, f"{file} ({of})" if of else f"{file}", missing)
        for of, table in cells.items()
    }


def _long_loads(table, names, source, missing):
    """`table` holds a row of [window,] layer, expert, count for each count."""
    numbers = table[:, :-1]
    whole = np.isfinite(numbers).all() and (numbers == np.floor(numbers)).all()
    if not whole or numbers.min() < 0 or numbers.max() > 2**53:
        raise ValueError(
            f"{source}: expected whole numbers of 0 or more as {', '.join(names)}, found others"
        )
    # Layers (and windows) keep their order but may skip numbers: a file may hold 0, 10, 20 only.
    found = [np.unique(numbers[:, n], return_inverse=True) for n in range(len(names) - 1)]
    check_sizes(source, layers=len(found[-1][0]), experts=int(numbers[:, -1].max()) + 1)
    expert = numbers[:, -1].astype(np.int64)
    shape = (*(len(values) for values, _ in found), int(expert.max()) + 1)
    check_count(f"{source}: counts in all windows", math.prod(shape), most=MOST_COUNTS)
    flat = np.ravel_multi_index((*(index for _, index in found), expert), shape)
    seen = np.bincount(flat, minlength=int(np.prod(shape)))
    wrong = seen > 1 if missing else seen != 1
    if wrong.any():
        where = np.argwhere(wrong)[0, 0]
        at = np.unravel_index(where, shape)
        named = [
            f"{name} {values[i]:g}"
            for name, (values, _), i in zip(names[:-1], found, at[:-1], strict=True)
        ]
        raise ValueError(
            f"{source}: expected one row for every layer and expert, found {seen[where]} for "
            f"{', '.join(named)}, expert {at[-1]}"
        )
    counts = np.zeros(len(seen))
    counts[flat] = table[:, -1]
    layers, _ = found[-1]
    labels = tuple(int(layer) for layer in layers)
    return Counts(counts.reshape(shape), source, labels, idle=missing)


def _is_number(cell):
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _numbers(row, file, line):
    try:
        return [float(cell) for cell in row]
    except ValueError as error:
        raise ValueError(f"{file}: expected numbers, found in row {line}: {error}") from None
