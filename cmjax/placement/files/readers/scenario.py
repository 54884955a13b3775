"""What a file of recordings holds: one or more named workloads, each as counts or as routes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmjax.placement.loads import Loads
from cmjax.placement.routes import Routes

SGLANG_KEY = "logical_count"
COUNT_KEYS = ("counts", "loads", "expert_popularity", "weight", SGLANG_KEY)
"""Names under which recorders store counts; the last is SGLang's."""


class NoRecordingError(ValueError):
    """A sound file that holds something else: a list of documents, say, or a licence."""


@dataclass(frozen=True, eq=False)
class Counts:
    """Counts as a file has them.

    Attributes:
      counts: `[layers, experts]` or `[windows, layers, experts]`.
      source, layer_labels, window_names: as in `Loads`.
      idle: whether layers may be without tokens: a recorder that counts all layers of a model has
        zeros for the dense ones, and for a step without tokens.
    """

    counts: Any
    source: str
    layer_labels: tuple[int, ...] | None = None
    window_names: tuple[str, ...] | None = None
    idle: bool = False

    def loads(self) -> Loads:
        """As loads. Idle layers and windows are left out, the layers' numbers kept; a layer without
        tokens in some windows only is taken there as it is in the others together.

        Raises: ValueError, one line, for counts that are no loads.
        """
        counts, labels, names = np.asarray(self.counts), self.layer_labels, self.window_names
        usable = counts.ndim in (2, 3) and counts.size and counts.dtype.kind in "iuf"
        if self.idle and usable and (counts >= 0).all() and counts.any():
            counts = counts.reshape(-1, *counts.shape[-2:]).astype(np.float64)
            windows, layers = counts.any((1, 2)), counts.any((0, 2))
            if labels is None and not layers.all():
                labels = tuple(range(len(layers)))
            counts = counts[windows][:, layers]
            if labels is not None and len(labels) == len(layers):
                labels = tuple(np.array(labels)[layers].tolist())
            if names is not None and len(names) == len(windows):
                names = tuple(np.array(names)[windows].tolist())
            share = counts.sum(0) / counts.sum((0, 2))[:, None]
            total = counts.sum(-1)
            usual = total.sum(1) / np.maximum((total > 0).sum(1), 1)
            counts = np.where((total == 0)[..., None], usual[:, None, None] * share, counts)
        return Loads(counts, self.source, labels, names)


Scenarios = Mapping[str, Counts | Routes]
"""Workloads by domain; a file that names none has the one domain ""."""


def summed(parts: Sequence[Counts], source: str) -> Counts:
    """What several ranks counted of one run, together.

    Windows are added one by one where all ranks have as many, else all windows of a rank are one.
    Raises: ValueError, one line, for counts that are no arrays of layers and experts.
    """
    arrays = [np.asarray(part.counts) for part in parts]
    for part, array in zip(parts, arrays, strict=True):
        if array.ndim not in (2, 3) or array.dtype.kind not in "iuf" or not array.size:
            part.loads()  # says what is wrong
    arrays = [array.reshape(-1, *array.shape[-2:]) for array in arrays]
    if len({len(array) for array in arrays}) > 1:
        arrays = [array.sum(0, keepdims=True) for array in arrays]
    labelled = [part.layer_labels or tuple(range(array.shape[1]))
                for part, array in zip(parts, arrays, strict=True)]  # fmt: skip
    labels = sorted(set().union(*labelled))
    total = np.zeros((len(arrays[0]), len(labels), max(array.shape[2] for array in arrays)))
    for array, own in zip(arrays, labelled, strict=True):
        total[:, np.searchsorted(labels, own), : array.shape[2]] += array
    named = any(part.layer_labels is not None for part in parts)
    idle = any(part.idle for part in parts) or len(set(labelled)) > 1
    return Counts(total, source, tuple(labels) if named else None, None, idle)
