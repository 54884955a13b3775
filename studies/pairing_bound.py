"""What no plan of two slots a rank can beat in the worst of several workloads.

    python -m studies.pairing_bound [--layers 3] [--ranks 160]

With two slots a rank, a plan pairs copies. At level T a copy of expert e, which has k copies, may
share a rank with one of expert f, which has l, only if no window w has a[w, e] / k + a[w, f] / l
above T. The fewest ranks that hold every expert, with shares y of pairs and z of numbers of copies,
are a linear program (HiGHS):

    min sum of y    each type (e, k): sum of its y >= k z[e, k]    each e: sum over k of z[e, k] = 1

No plan reaches a T at which that is more than the ranks there are: what integer pairs and copies
need is at least this. The largest such T is found by bisection, layer by layer. Against it stand
the best plan that `cmjax.placement.search` finds, and what copies alone allow.
"""

import dataclasses

import numpy as np
import tyro
from jaxtyping import Float, Int
from rich.table import Table
from scipy.optimize import linprog
from scipy.sparse import coo_array

from cmjax import placement
from cmjax.commands.output import track
from cmjax.placement.search import relative_loads
from cmjax.report import terminal

_MORE = 2  # copies of an expert looked at beyond the fewest that T allows, or until one is
_LIGHT = 1 / 3  # this share of T


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Options of this study."""

    layers: int = 3
    """Layers of the synthetic family of 12 workloads."""
    ranks: int = 160
    """Ranks, of two slots each."""
    within: float = 0.01
    """How closely T is bracketed."""


def pairing_bound(
    loads: Float[np.ndarray, "windows experts"], ranks: int, *, most: float, within: float = 0.01
) -> float:
    """A T that no plan of two slots a rank goes below, of a layer.

    Args:
      loads: tokens of every expert over the mean tokens of a rank.
      ranks: ranks with two slots each.
      most: a T that some plan reaches.
      within: a T this much larger could not be excluded.
    """
    least = 1.0
    while most - least > within:
        middle = (least + most) / 2
        if ranks_needed(loads, middle) > ranks * (1 + 1e-7):
            least = middle
        else:
            most = middle
    return least


def ranks_needed(loads: Float[np.ndarray, "windows experts"], level: float) -> float:
    """Ranks of two slots that every plan needs to stay at or below a level; not always whole."""
    expert, copies, weight = _types(loads, level)
    one, other = _pairs(expert, copies, weight, level)
    types, pairs, experts = len(expert), len(one), loads.shape[1]
    index, pair = np.arange(types), np.arange(pairs)
    # Variables: shares of pairs, of types alone on a rank, and of numbers of copies.
    rows = np.concatenate([one, other, index, index])
    columns = np.concatenate([pair, pair, pairs + index, pairs + types + index])
    values = np.concatenate([np.ones(2 * pairs + types), -copies.astype(float)])
    size = pairs + 2 * types
    served = coo_array((values, (rows, columns)), shape=(types, size)).tocsr()
    chosen = coo_array(
        (np.ones(types), (expert, pairs + types + index)), shape=(experts, size)
    ).tocsr()
    found = linprog(
        np.concatenate([np.ones(pairs + types), np.zeros(types)]),
        A_ub=-served, b_ub=np.zeros(types), A_eq=chosen, b_eq=np.ones(experts), method="highs",
    )  # fmt: skip
    if found.status != 0:
        raise RuntimeError(f"ranks_needed: HiGHS ended with: {found.message}")
    return float(found.fun)


def _types(loads, level) -> tuple[Int[np.ndarray, "types"], Int[np.ndarray, "types"], np.ndarray]:
    """Expert, copies and load by window [windows, types] of every type at a level.

    More copies than are looked at count as one more of no load at all, which no plan can better.
    """
    top = loads.max(0) / level
    fewest = np.maximum(np.ceil(top - 1e-9), 1)
    kinds = (np.maximum(fewest + _MORE, np.ceil(top / _LIGHT)) - fewest).astype(int) + 2
    last = np.cumsum(kinds) - 1
    expert = np.repeat(np.arange(loads.shape[1]), kinds)
    copies = np.arange(len(expert)) - (last - kinds + 1 - fewest.astype(int))[expert]
    weight = loads[:, expert] / copies
    weight[:, last] = 0.0
    return expert, copies, weight


def _pairs(expert, copies, weight, level):
    """Types that may share a rank. An expert has one number of copies."""
    one, other = [], []
    for first in range(len(expert)):
        fits = (weight[:, first:] + weight[:, first, None]).max(0) <= level * (1 + 1e-9)
        fits &= (expert[first:] != expert[first]) | (copies[first:] == copies[first])
        partner = first + np.flatnonzero(fits)
        one.append(np.full(len(partner), first))
        other.append(partner)
    return np.concatenate(one), np.concatenate(other)


def run(study: Study) -> list[dict]:
    """Rows of all layers."""
    family = placement.example_family()
    loads = placement.Loads(family.counts[:, : study.layers], family.source)
    problem = placement.Problem(
        loads, study.ranks, 2 * study.ranks - loads.experts, objective=placement.Risk("worst")
    )
    plan = placement.search(problem, lambda tokens: tokens.max(-1))
    tokens = plan.tokens_per_rank(loads.counts)
    found = (tokens.max(-1) / tokens.mean(-1)).max(0)
    alone = placement.lower_bound_objective_s(problem, lambda tokens: tokens.max(-1))
    mean = loads.counts.sum(-1).max(0) / study.ranks
    relative = relative_loads(problem)
    return [
        {
            "layer": layer, "copies": float(alone[layer] / mean[layer]),
            "pairs": pairing_bound(
                relative[:, layer], study.ranks, most=float(found[layer]), within=study.within
            ),
            "search": float(found[layer]),
        }
        for layer in track(range(study.layers), "bounding")
    ]  # fmt: skip


def main(study: Study) -> None:
    """Print the table."""
    table = Table(title=f"Busiest rank over the mean in the worst of 12 workloads, "
                        f"{study.ranks} ranks of two slots", box=None)  # fmt: skip
    for name in ("layer", "bound of copies", "bound of pairs", "search"):
        table.add_column(name, justify="right")
    for row in run(study):
        cells = (f"{row[key]:.3f}" for key in ("copies", "pairs", "search"))
        table.add_row(str(row["layer"]), *cells)
    terminal().print(table)


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
