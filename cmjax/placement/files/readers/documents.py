"""Recordings as JSON: nested lists, or objects that name domains, layers and experts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cmjax.inputs import read_json as read_document
from cmjax.inputs import read_json_lines
from cmjax.placement.files.readers.scenario import (
    COUNT_KEYS,
    SGLANG_KEY,
    Counts,
    NoRecordingError,
    Scenarios,
)
from cmjax.placement.files.readers.tables import long_scenarios
from cmjax.placement.loads import SHAPES


def read_json(file: Path, key: str | None, experts: int | None) -> Scenarios:
    """Nested lists, under a known key or at the top; an object of them is one workload per name.
    Objects whose keys are numbers in a row, from 0 or more, are lists of layers or experts.

    Raises: NoRecordingError for an object without counts; ValueError for text that is no JSON,
      ragged lists, or an unknown `key`.
    """
    return _read_document(read_document(file), key, file)


def read_jsonl(file: Path, key: str | None, experts: int | None) -> Scenarios:
    """JSON lines: one object a line, each with counts (a window), or with layer, expert and count
    (SGLang's and others' rows). An object's `domain` or `workload` names its workload.

    Raises: NoRecordingError for objects without either; ValueError for a line that is no JSON, or
      lines of different kinds.
    """
    windows: dict[str, list] = {}
    rows: list[Mapping[str, Any]] = []
    idle = False
    for _, document in read_json_lines(file):
        if isinstance(document, Mapping):
            name = key or next((name for name in COUNT_KEYS if name in document), None)
            if name is None or not isinstance(document.get(name), list):
                rows.append(document)
                continue
            of = document.get("workload", document.get("domain", ""))
            windows.setdefault(str(of), []).append(document[name])
            idle |= name == SGLANG_KEY
        else:
            windows.setdefault("", []).append(document)
    if rows and windows:
        raise ValueError(f"{file}: expected lines of one kind, found counts and other objects")
    if rows:
        return long_scenarios(rows, file)
    if not windows:
        raise ValueError(f"{file}: expected a window or a count per line, found an empty file")
    found = {}
    for of, counts in windows.items():
        source = f"{file} ({of})" if of else str(file)
        found[of] = Counts(_windows(counts, source), source, idle=idle)
    return found


def _windows(counts, source):
    """Windows of [layers, experts] or of steps of them, one after the other."""
    try:
        arrays = [np.array(window) for window in counts]
        arrays = [array.reshape(-1, *array.shape[-2:]) for array in arrays]
        return np.concatenate(arrays)
    except ValueError:
        raise ValueError(f"{source}: expected {SHAPES} in every line, found ragged lists") from None


def _read_document(document, key, file):
    labels = document.get("layers") if isinstance(document, Mapping) else None
    found = _choose(document, key, file)
    idle = isinstance(document, Mapping) and found is document.get(SGLANG_KEY, 0)
    if isinstance(found, Mapping) and not _numbered(found):
        if not found:
            raise ValueError(f"{file}: expected counts or an object of domains, found it empty")
        return {
            name: _loads(value, labels, f"{file} ({name})", idle=idle)
            for name, value in found.items()
        }
    source = str(file) if key is None else f"{file}:{key}"
    return {"": _loads(found, labels, source, _named(document), idle=idle)}


def _named(document):
    """Names of windows beside counts."""
    for name in ("workload", "workloads", "domain", "domains"):
        found = document.get(name) if isinstance(document, Mapping) else None
        if isinstance(found, list) and all(isinstance(of, str) for of in found):
            return tuple(found)
    return None


def describe(document: Any) -> str:
    """What a JSON document is, for messages."""
    if isinstance(document, Mapping):
        names = [*document]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return f"the keys {', '.join(names[:8]) or 'none'}{more}"
    return type(document).__name__


def _choose(document, key, file):
    """The part of a document that holds counts: lists, or an object of domains."""
    if not isinstance(document, Mapping):
        if key is not None:
            raise ValueError(f"{file}: expected an object to choose {key!r} from, found a list")
        if not isinstance(document, list):
            raise NoRecordingError(
                f"{file}: expected nested lists {SHAPES}, found {describe(document)}"
            )
        return document
    counts = next((document[name] for name in COUNT_KEYS if name in document), None)
    if key is not None:
        if key in document:
            return document[key]
        if isinstance(counts, Mapping) and key in counts:
            return counts[key]
        raise ValueError(f"{file}: found no key {key!r} in {describe(document)}")
    if counts is not None:
        return counts
    if document and (
        _numbered(document) or all(isinstance(value, list) for value in document.values())
    ):
        return document
    raise NoRecordingError(
        f"{file}: expected nested lists {SHAPES}, one of the keys {', '.join(COUNT_KEYS)}, or a "
        f"choice {file.name}:KEY; found {describe(document)}"
    )


def _loads(value, labels, source, names=None, *, idle=False):
    if isinstance(value, Mapping) and _numbered(value):
        labels = tuple(sorted(int(name) for name in value))
    elif not (isinstance(labels, list) and all(isinstance(n, int) for n in labels)):
        labels = None
    value = _listed(value)
    if not isinstance(value, list):
        raise ValueError(f"{source}: expected nested lists {SHAPES}, found {describe(value)}")
    try:
        counts = np.array(value) if value else np.zeros((0, 0))
    except ValueError:
        raise ValueError(f"{source}: expected {SHAPES}, found ragged lists") from None
    if names is not None and (counts.ndim != 3 or len(names) != len(counts)):
        names = None
    return Counts(counts, source, None if labels is None else tuple(labels), names, idle)


def _numbered(value):
    """Whether an object's keys are consecutive numbers, as of layers 1 to 26."""
    if not isinstance(value, Mapping) or not value or not all(n.isdecimal() for n in value):
        return False
    numbers = sorted(int(name) for name in value)
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def _listed(value):
    if _numbered(value):
        return [_listed(value[name]) for name in sorted(value, key=int)]
    return value
