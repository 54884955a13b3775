"""What a token costs on each rank, over what it costs on an ordinary one.

A rank may be slower than others, or further from those that send to it. A plan then counts tokens
in ordinary ones: a rank of cost 1.25 that serves 80 is as busy as an ordinary one with 100.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from cmjax.inputs.arrays import read_array
from cmjax.inputs.documents import read_json
from cmjax.inputs.numbers import shown
from cmjax.inputs.tables import read_csv

RankCost = str | Path | np.ndarray | Sequence[Any]
"""A number a rank, or a matrix [source rank, rank]; or a .csv, .json or .npy file of them."""


def rank_cost(given: RankCost, ranks: int, *, routing: str = "even") -> tuple[float, ...]:
    """The cost of a token on each rank.

    Args:
      given: as `RankCost` says. Of a matrix the mean over the sources counts, as every rank sends
        equally many tokens of an expert to each of its copies.
      ranks: how many there must be.
      routing: how tokens choose among copies; with another rule than `even` sources do not reach
        all copies alike, and a matrix is refused.
    Raises: ValueError of one line: a file that cannot be read, another number of ranks, a number
      that is not positive and finite, or a matrix under another rule.

    >>> rank_cost([1.0, 1.5], ranks=2)
    (1.0, 1.5)
    >>> rank_cost([[1.0, 2.0], [2.0, 1.0]], ranks=2)  # the way to the other rank costs as much
    (1.5, 1.5)
    """
    source = f"rank_cost {given}" if isinstance(given, str | Path) else "rank_cost"
    value = _read(given) if isinstance(given, str | Path) else given
    try:
        found = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{source}: expected numbers, got {shown(value)}") from None
    if found.shape not in ((ranks,), (ranks, ranks)):
        raise ValueError(
            f"{source}: expected {ranks} numbers, one a rank, or a matrix [{ranks}, {ranks}] of "
            f"source rank and rank, got shape {found.shape}"
        )
    wrong = np.argwhere(~(np.isfinite(found) & (found > 0)))
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise ValueError(f"{source}: expected positive finite numbers, got {found[at]:g} at {at}")
    if found.ndim == 2 and routing != "even":
        raise ValueError(
            f"{source}: a matrix goes with routing even; for {routing} give one number a rank"
        )
    return tuple((found if found.ndim == 1 else found.mean(0)).tolist())


def even_level(cost: tuple[float, ...] | None, ranks: int) -> float:
    """Tokens of a rank over their mean, where all ranks are equally busy.

    >>> even_level((1.0, 3.0), ranks=2)  # three quarters of the tokens on the first
    1.5
    """
    return 1.0 if cost is None else ranks / float(np.sum(1 / np.asarray(cost)))


def weigh(
    tokens: Float[np.ndarray, "*batch ranks"], cost: tuple[float, ...] | None
) -> Float[np.ndarray, "*batch ranks"]:
    """Tokens in ordinary ones."""
    return tokens if cost is None else tokens * np.asarray(cost)


def _read(path: str | Path):
    """The numbers of a file."""
    kind = Path(path).suffix
    if kind == ".npy":
        return read_array(path)
    if kind == ".json":
        return read_json(path)
    if kind == ".csv":
        rows = [cells for _, cells in read_csv(path)]
        return rows[0] if len(rows) == 1 else [c[0] for c in rows] if _column(rows) else rows
    raise ValueError(f"rank_cost {path}: expected a .csv, .json or .npy file")


def _column(rows: list[list[str]]) -> bool:
    return all(len(cells) == 1 for cells in rows)
