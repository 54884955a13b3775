"""What the backward pass computes again, layer by layer.

    full:2-1-0x2/selective:1-2-3x2      of stage 0 two layers whole, attention of one more

Layers of a kind cost alike, so their numbers say all. Of every chunk the first are recomputed
whole, attention alone of the next, and nothing of the rest.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from cmjax.models.dense import Recompute

MODES: tuple[Recompute, ...] = get_args(Recompute)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Layers of a chunk, by what is recomputed of them; numbers, or NumPy arrays of the same shape.

    Fields:
      layers: all of them. full: recomputed whole. selective: of which attention is.
    """

    layers: int
    full: Any
    selective: Any

    @property
    def by_mode(self) -> dict[Recompute, Any]:
        """How many layers are of each mode that any is of."""
        none = self.layers - self.full - self.selective
        numbers = {"none": none, "selective": self.selective, "full": self.full}
        return {mode: numbers[mode] for mode in MODES if np.any(numbers[mode])}

    def mode_of(self, layer: int) -> Recompute:
        """What is recomputed of a layer, where counts are numbers."""
        if layer < self.full:
            return "full"
        return "selective" if layer < self.full + self.selective else "none"

    @property
    def last(self) -> dict[Recompute, Any]:
        """Whether the last layer is of each mode that it ever is of."""
        full, some = self.full == self.layers, self.full + self.selective == self.layers
        here = {"none": 1 - some, "selective": some - full * 1, "full": full * 1}
        return {mode: here[mode] for mode in MODES if np.any(here[mode])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layerwise:
    """Numbers of a chunk's layers that are recomputed.

    Fields:
      full: whole, for every stage, or one number for all of them. selective: their attention.
    """

    full: tuple[int, ...] = (0,)
    selective: tuple[int, ...] = (0,)

    def __post_init__(self):
        for name in ("full", "selective"):
            counts = getattr(self, name)
            if not counts or any(not isinstance(n, int) or n < 0 for n in counts):
                raise ValueError(f"recompute: {name} must be numbers of layers, got {counts!r}")

    def of(self, stage: int, layers: int) -> Counts:
        """Of a stage whose chunks have so many layers."""
        return Counts(layers, _of(self.full, stage), _of(self.selective, stage))

    def check(self, layers: Sequence[int]) -> None:
        """Raises: ValueError: numbers for other stages than those whose chunks have `layers`, or of
        more layers than that."""
        for name in ("full", "selective"):
            if len(getattr(self, name)) not in (1, len(layers)):
                raise ValueError(
                    f"plan: recompute={self} has {len(getattr(self, name))} numbers of {name} "
                    f"layers; one for each of the {len(layers)} stages, or one for all, would do"
                )
        for stage, number in enumerate(layers):
            counts = self.of(stage, number)
            if counts.full + counts.selective > number:
                raise ValueError(
                    f"plan: recompute={self} names {counts.full + counts.selective} layers of "
                    f"stage {stage}, whose chunks have {number}"
                )

    def __str__(self) -> str:
        parts = {"full": self.full, "selective": self.selective}
        said = [f"{name}:{runs_text(counts)}" for name, counts in parts.items() if any(counts)]
        return "/".join(said) or "full:0"


def parse_layerwise(text: str) -> Layerwise:
    """The inverse of `str`.

    >>> parse_layerwise("full:2-1-0/selective:1-2x2").selective
    (1, 2, 2)

    Raises: ValueError: another form, with what would do.
    """
    found: dict[str, tuple[int, ...]] = {}
    for part in text.split("/"):
        name, _, written = part.partition(":")
        numbers = read_runs(written)
        if name not in ("full", "selective") or name in found or numbers is None:
            raise ValueError(
                "plan: recompute takes numbers of layers as full:2 or full:3-2-0x6/selective:1x8 "
                f"(one for every stage, or one for all), got {text!r}"
            )
        found[name] = numbers
    return Layerwise(**found)


def shortest(counts: Sequence[Counts]) -> Recompute | Layerwise:
    """What every stage recomputes, in as few words as say it."""
    for mode in MODES:
        if all(each.by_mode.get(mode) == each.layers for each in counts):
            return mode
    return Layerwise(
        full=_fewest(each.full for each in counts),
        selective=_fewest(each.selective for each in counts),
    )


def _fewest(numbers) -> tuple[int, ...]:
    numbers = tuple(map(int, numbers))
    return numbers[:1] if len(set(numbers)) == 1 else numbers


def _of(counts: tuple[int, ...], stage: int) -> int:
    return counts[0] if len(counts) == 1 else counts[stage]


_RUN = re.compile(r"(?P<layers>[0-9]{1,9})(x(?P<stages>[1-9][0-9]{0,4}))?")


def read_runs(text: str) -> tuple[int, ...] | None:
    """The inverse of `runs_text`; `None` of another form.

    >>> read_runs("3-2x4")
    (3, 2, 2, 2, 2)
    """
    runs = [_RUN.fullmatch(run) for run in text.split("-")]
    if not all(runs):
        return None
    return tuple(int(run["layers"]) for run in runs if run for _ in range(int(run["stages"] or 1)))


def runs_text(counts: Sequence[int]) -> str:
    """Numbers in a row, those that repeat as 2x14."""
    runs = [(number, len(list(run))) for number, run in itertools.groupby(counts)]
    return "-".join(f"{number}x{times}" if times > 1 else str(number) for number, times in runs)
