"""Recordings as NumPy arrays: `.npy` and `.npz`, counts and token-level routes."""

import re
from pathlib import Path

import numpy as np

from cmjax.inputs import read_array, read_arrays, whole_numbers
from cmjax.placement.files.readers.scenario import (
    COUNT_KEYS,
    SGLANG_KEY,
    Counts,
    NoRecordingError,
    Scenarios,
)
from cmjax.placement.files.readers.tables import document_categories
from cmjax.placement.loads import SHAPES
from cmjax.placement.routes import Routes


def read_npy(file: Path, key: str | None, experts: int | None) -> Scenarios:
    """One array of counts.

    Raises: ValueError for a damaged file, or an array that is no counts.
    """
    return {"": Counts(read_array(file), str(file))}


def read_npz(file: Path, key: str | None, experts: int | None) -> Scenarios:
    """Counts under a known name, routes named `ids`, the rows of `freq` by `category`, the only
    array that can be counts, or one workload per array where all have the same layers and experts.
    Beside counts, `layers` (or `layer_ids`) numbers them and `workload` or `domain` names windows.

    Raises: NoRecordingError if there is none of these; ValueError for a damaged file.
    """
    arrays = read_arrays(file)
    source = f"{file}" if key is None else f"{file}:{key}"
    if key is not None and key not in arrays:
        raise ValueError(f"{file}: found no key {key!r} among {', '.join(arrays)}")
    if key is None:
        key = next((name for name in (*COUNT_KEYS, "ids") if name in arrays), None)
        if key is None:
            counts = [name for name, array in arrays.items() if _may_be_counts(array)]
            by_category = {"freq", "category"} <= set(arrays)
            if len(arrays) == 1 or (len(counts) == 1 and not by_category):
                key = next(iter(counts or arrays))
    if key == "ids":
        return {"": _routes(arrays, file, experts)}
    if key is not None:
        return {"": Counts(
            arrays[key], source, _labels(arrays, arrays[key]), _names(arrays, arrays[key]),
            idle=key == SGLANG_KEY,
        )}  # fmt: skip
    if {"freq", "category"} <= set(arrays):
        return _by_category(arrays["freq"], arrays["category"], file)
    shapes = {array.shape[-2:] for array in arrays.values()}
    plain = all(map(_may_be_counts, arrays.values()))
    if arrays and plain and len(shapes) == 1 and not is_pairs(arrays):
        return {name: Counts(array, f"{file}:{name}") for name, array in arrays.items()}
    raise NoRecordingError(
        f"{file}: expected an .npz of one array, of arrays of one shape, or with a key counts, "
        f"loads or ids, or chosen by {file.name}:KEY; found the keys {', '.join(arrays) or 'none'}"
    )


def _may_be_counts(array):
    return array.dtype.kind in "iuf" and array.ndim in (2, 3)


def _labels(arrays, counts):
    """Layer numbers beside counts."""
    for name in ("layers", "layer_ids", "layer_labels"):
        found = arrays.get(name)
        if found is not None and found.dtype.kind in "iu" and found.shape == counts.shape[-2:-1]:
            return tuple(found.tolist())
    return None


def _names(arrays, counts):
    """Names of windows beside counts."""
    for name in ("workload", "workloads", "domain", "domains"):
        found = arrays.get(name)
        if found is not None and counts.ndim == 3 and found.shape == counts.shape[:1]:
            return tuple(map(str, found.tolist()))
    return None


def is_pairs(arrays: dict[str, np.ndarray]) -> bool:
    """Whether every array is `[pairs, experts, experts]`: co-activation, not counts."""
    return bool(arrays) and all(
        array.ndim == 3 and array.shape[1] == array.shape[2] for array in arrays.values()
    )


def _routes(arrays, file, experts):
    ids = arrays["ids"]
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
    ids = ids.swapaxes(0, 1) if ids.shape[1] > ids.shape[0] else ids
    sequence, domain, names = None, None, ()
    if "seq_lens" in arrays:
        lengths = whole_numbers(arrays["seq_lens"], "seq_lens", str(file), ndim=1, most=len(ids))
        total = sum(lengths.tolist())  # which never wraps around
        if total != len(ids):
            raise ValueError(
                f"{file}: expected seq_lens that sum to {len(ids)} tokens, found {total}"
            )
        sequence = np.repeat(np.arange(len(lengths)), lengths)
    elif np.shape(arrays.get("doc", ())) == ids.shape[:1]:
        sequence = whole_numbers(
            arrays["doc"], "doc", str(file), ndim=1, least=-(2**62), most=2**62
        )
        categories = document_categories(file.with_name("docs.csv"))
        if categories is not None:
            lost = sorted(set(np.unique(sequence).tolist()) - set(categories))
            if lost:
                raise ValueError(f"{file}: docs.csv beside it has no row for doc {lost[0]}")
            names = tuple(sorted(set(categories.values())))
            number = {name: index for index, name in enumerate(names)}
            docs, where = np.unique(sequence, return_inverse=True)
            domain = np.array([number[categories[int(doc)]] for doc in docs])[where]
            used = np.unique(domain)
            names, domain = tuple(names[n] for n in used), np.searchsorted(used, domain)
    found = int(ids.max()) + 1 if experts is None else experts
    return Routes(ids, found, sequence, domain, names, str(file))


def _by_category(freq, category, file):
    """One workload per category; a category's rows (its phases, say) are its windows."""
    if category.dtype.kind not in "USiu":
        raise ValueError(f"{file}: expected names or numbers in category, found {category.dtype}")
    if freq.ndim != 3 or category.shape != freq.shape[:1]:
        raise ValueError(
            f"{file}: expected freq {SHAPES.partition(' or ')[2]} and one category per window, "
            f"found shapes {freq.shape} and {category.shape}"
        )
    names = dict.fromkeys(re.sub(r"[/:]", "_", str(name)) for name in category)
    return {name: Counts(freq[category == name], f"{file} ({name})") for name in names}
