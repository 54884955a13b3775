"""Expert loads: how many tokens each routed expert got, per layer and time window."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

import numpy as np
from jaxtyping import Float

from cmjax.inputs import check_count, listed, shown

MOST_EXPERTS = 2**16
"""Experts of a layer, and ranks: more than any model has, and a table of them fits."""
MOST_LAYERS = 10_000
MOST_COUNTS = 2**27
_MOST_TOKENS = 1e30  # so that sums and products of counts stay finite
SHAPES = "[layers, experts] or [windows, layers, experts]"


@dataclass(frozen=True, eq=False)
class Loads:
    """Tokens sent to each routed expert.

    Attributes:
      counts: float64 `[windows, layers, experts]`, tokens (or any unit proportional to them);
        read-only. A two-dimensional array is taken as one window.
      source: where the counts are from, for messages and reports.
      layer_labels: the model's own number of each layer, where the recording says; a recording may
        hold layers 0, 10 and 20 only, and a model's first layers may be dense.
      window_names: what each window is, where the recording says: a workload's name.
    Raises: ValueError, one line, for counts that are no loads.

    >>> loads = Loads([[30, 10, 20, 40]])  # one window of one layer
    >>> loads.layers, loads.experts, loads.counts.shape
    (1, 4, (1, 1, 4))
    >>> loads.scaled(8).counts.tolist()
    [[[2.4, 0.8, 1.6, 3.2]]]
    """

    counts: Float[np.ndarray, "windows layers experts"]
    source: str = "loads"
    layer_labels: tuple[int, ...] | None = None
    window_names: tuple[str, ...] | None = None

    def __post_init__(self):
        counts = np.asarray(self.counts)
        if counts.dtype.kind not in "biuf":
            raise ValueError(f"{self.source}: expected numbers, found {counts.dtype} data")
        if counts.ndim not in (2, 3):
            raise ValueError(
                f"{self.source}: expected {SHAPES}, found an array of shape {counts.shape}"
            )
        if counts.size == 0:
            raise ValueError(f"{self.source}: expected {SHAPES}, found no counts")
        check_sizes(self.source, layers=counts.shape[-2], experts=counts.shape[-1])
        check_count(f"{self.source}: counts", counts.size, most=MOST_COUNTS)
        counts = counts.astype(np.float64).reshape(-1, *counts.shape[-2:])
        for name, bad in (
            ("NaN", np.isnan(counts)),
            ("infinite", np.isinf(counts)),
            ("negative", counts < 0),
            ("impossible", counts > _MOST_TOKENS),
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
        object.__setattr__(
            self, "layer_labels", checked_labels(self.layer_labels, counts.shape[1], self.source)
        )
        if self.window_names is not None:
            if len(self.window_names) != len(counts):
                raise ValueError(
                    f"{self.source}: expected {len(counts)} names of windows, found "
                    f"{len(self.window_names)}"
                )
            object.__setattr__(self, "window_names", tuple(map(str, self.window_names)))

    @property
    def names(self) -> tuple[str, ...]:
        """A name for every window: its own, else its number."""
        return self.window_names or tuple(f"window {n}" for n in range(len(self.counts)))

    @property
    def layers(self) -> int:
        return self.counts.shape[1]

    @property
    def experts(self) -> int:
        return self.counts.shape[2]

    def scaled(self, assignments: float) -> "Loads":
        """The same distribution in a step of `assignments` = tokens × top-k per layer."""
        total = self.counts.sum(-1, keepdims=True)
        return replace(self, counts=self.counts / total * assignments)

    def numbered(self, first_layer: int | None) -> "Loads":
        """Layers numbered from `first_layer`, unless it is None or the recording numbers them."""
        if first_layer is None or self.layer_labels is not None:
            return self
        labels = tuple(range(first_layer, first_layer + self.layers))
        return replace(self, layer_labels=labels)

    def join(self, other: "Loads") -> "Loads":
        """Windows of both, each scaled to the tokens of the first: workloads count alike.

        Raises: ValueError if layers or experts differ.
        """
        self.check_same_model(other)
        total = float(self.counts[0].sum(-1).mean())
        counts = [part.scaled(total).counts for part in (self, other)]
        names = [part.window_names or _numbered(part) for part in (self, other)]
        return replace(self, counts=np.concatenate(counts), window_names=(*names[0], *names[1]))

    def of_windows(self, windows: slice | Sequence[int]) -> "Loads":
        """The loads of some windows."""
        names = self.window_names
        if names is not None:
            names = tuple(np.array(names, object)[windows])
        return replace(self, counts=self.counts[windows], window_names=names)

    def check_same_model(self, other: "Loads") -> None:
        """Raise ValueError unless both count the same layers and experts."""
        if other.counts.shape[1:] != self.counts.shape[1:]:
            raise ValueError(
                f"{other.source}: {other.layers} layers of {other.experts} experts; {self.source} "
                f"has {self.layers} of {self.experts}"
            )
        labels = (other.layer_labels, self.layer_labels)
        if None not in labels and labels[0] != labels[1]:
            raise ValueError(f"{other.source}: numbers its layers otherwise than {self.source}")

    def shrunk(self, share: float) -> "Loads":
        """Loads nearer to even: experts differ by `1 - share` of what they differ by here.

        What to plan on for texts unlike the recorded ones, where only part of the differences is
        expected to recur (shrinkage towards the mean; James and Stein, 1961). Totals stay.

        Raises: ValueError unless `share` lies between 0 and 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"shrink must lie between 0 and 1, got {share}")
        mean = self.counts.mean(-1, keepdims=True)
        return replace(self, counts=(1 - share) * self.counts + share * mean)


def _numbered(loads: Loads) -> tuple[str, ...]:
    """Names of windows after where they are from."""
    stem = PurePath(loads.source).name.rpartition(".")[0] or loads.source
    count = len(loads.counts)
    return (stem,) if count == 1 else tuple(f"{stem} {n}" for n in range(count))


def check_sizes(source: str, *, layers: int = 1, experts: int = 1, ranks: int = 1) -> None:
    """Raise ValueError, one line that starts with `source`, for sizes that no model has."""
    check_count(f"{source}: layers", layers, most=MOST_LAYERS)
    check_count(f"{source}: experts", experts, most=MOST_EXPERTS)
    check_count(f"{source}: ranks", ranks, most=MOST_EXPERTS)


def checked_labels(
    labels: Sequence[int] | None, layers: int, source: str
) -> tuple[int, ...] | None:
    """Layer labels as a tuple of distinct whole numbers of 0 or more, one per layer.

    Raises: ValueError, one line that starts with `source`.
    """
    if labels is None:
        return None
    check_sizes(source, layers=len(labels))
    whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in labels)
    if not whole or len(labels) != layers or len(set(labels)) != layers or min(labels) < 0:
        raise ValueError(
            f"{source}: expected {layers} different layer numbers of 0 or more, found "
            f"{listed([shown(label) for label in labels]) or 'none'}"
        )
    check_count(f"{source}: a layer's number", max(labels), least=0, most=MOST_LAYERS)
    return tuple(int(label) for label in labels)
