"""How long a step takes, as the event loop looks it up.

    step_s = batch(prompt tokens, their length, decoding requests, their context)
             + dense(tokens) + rows(sequences) + constant

Each part is interpolated linearly between the nodes of its axes. The length of prompt tokens says
how much they attend to: a step that computes c_i new tokens behind k_i cached ones, for requests i,
has sum c_i tokens of length  sum c_i (2 k_i + c_i) / sum c_i:  the length of equal prompts that
would be as much work. Below the first node of an axis the first value holds; beyond the last one
the last slope goes on.
"""

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Step times of one kind of worker.

    Fields:
      tokens, length, requests, context: nodes of the axes; `requests` are per data-parallel rank.
      batch_s: seconds at the nodes.
      dense_tokens, dense_s: by all tokens of a step; rows, rows_s: by its sequences; may be empty.
      decode_tokens: tokens of a decoding request in a step, drafts included.
      constant_s: of every step.
    """

    tokens: Float64[np.ndarray, "t"]
    length: Float64[np.ndarray, "l"]
    requests: Float64[np.ndarray, "n"]
    context: Float64[np.ndarray, "c"]
    batch_s: Float64[np.ndarray, "t l n c"]
    dense_tokens: Float64[np.ndarray, "d"] = dataclasses.field(default_factory=lambda: np.zeros(0))
    dense_s: Float64[np.ndarray, "d"] = dataclasses.field(default_factory=lambda: np.zeros(0))
    rows: Float64[np.ndarray, "s"] = dataclasses.field(default_factory=lambda: np.zeros(0))
    rows_s: Float64[np.ndarray, "s"] = dataclasses.field(default_factory=lambda: np.zeros(0))
    decode_tokens: int = 1
    constant_s: float = 0.0


class Lookup:
    """A table as the Python loop reads it."""

    def __init__(self, table: Table):
        self.axes = [
            a.tolist() for a in (table.tokens, table.length, table.requests, table.context)
        ]
        self.values = table.batch_s.reshape(-1).tolist()
        self.dense = table.dense_tokens.tolist(), table.dense_s.tolist()
        self.rows = table.rows.tolist(), table.rows_s.tolist()
        self.decode_tokens, self.constant_s = table.decode_tokens, table.constant_s

    def step_s(
        self, tokens: int, length: float, requests: int, context: float, total: int, sequences: int
    ) -> float:
        """Seconds of a step; `requests` per rank, `total` tokens and `sequences` of the worker."""
        at = (float(tokens), length, float(requests), context)
        cells = [_cell(axis, x) for axis, x in zip(self.axes, at, strict=True)]
        n1, n2, n3 = (len(axis) for axis in self.axes[1:])
        found = 0.0
        for i, a in cells[0]:
            for j, b in cells[1]:
                ab = a * b
                for k, c in cells[2]:
                    abc = ab * c
                    base = ((i * n1 + j) * n2 + k) * n3
                    for m, d in cells[3]:
                        found += abc * d * self.values[base + m]
        found += _line(*self.dense, float(total))
        found += _line(*self.rows, float(sequences))
        return found + self.constant_s


def _cell(axis: Sequence[float], x: float) -> list[tuple[int, float]]:
    """The nodes around `x` and their weights; a weight of zero is left out."""
    if len(axis) == 1 or x <= axis[0]:
        return [(0, 1.0)]
    i = min(bisect_right(axis, x) - 1, len(axis) - 2)
    above = (x - axis[i]) / (axis[i + 1] - axis[i])
    if above == 0.0:
        return [(i, 1.0)]
    if above == 1.0:
        return [(i + 1, 1.0)]
    return [(i, 1.0 - above), (i + 1, above)]


def _line(nodes: Sequence[float], values: Sequence[float], x: float) -> float:
    if not nodes:
        return 0.0
    found = 0.0
    for i, weight in _cell(nodes, x):
        found += weight * values[i]
    return found
