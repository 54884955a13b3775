"""How good a plan is: balance, priced time, and how far it is from what no plan can beat.

PAR (peak-to-average ratio) of a layer is max / mean of its tokens per rank; balancedness is its
inverse, mean / max.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cmjax.placement.judging.align import align
from cmjax.placement.judging.bounds import lower_bound_time_s
from cmjax.placement.judging.multicast import Reach
from cmjax.placement.loads import Loads
from cmjax.placement.plan import Plan
from cmjax.placement.pricing import LayerTime, price_s
from cmjax.placement.problem import Problem


@dataclass(frozen=True, eq=False, kw_only=True)
class Score:
    """A plan under loads; arrays are float64 and keep the windows apart.

    Attributes:
      par: max / mean tokens per rank, by window and layer.
      time_s: priced time of all layers together, by window.
      lower_bound_s: what no plan with as many slots can beat, by window.
      objective_s: the problem's objective of `time_s`; None where no problem says one.
      objective_bound_s: what no plan's objective can beat.
      step_par: max / mean tokens per rank of sampled steps, by window and layer; None if not asked.
      reach: ranks and nodes a token goes to; None without routes.
      solve_s: seconds that the plan took to make.
      test: the plan's score under loads it was not made for; None if none were given.
      windows: names of the windows, where they have some.
    """

    par: Float[np.ndarray, "windows layers"]
    time_s: Float[np.ndarray, "windows"]
    lower_bound_s: Float[np.ndarray, "windows"]
    objective_s: float | None = None
    objective_bound_s: float | None = None
    step_par: Float[np.ndarray, "windows layers"] | None = None
    reach: Reach | None = None
    solve_s: float | None = None
    test: "Score | None" = None
    windows: tuple[str, ...] | None = None

    @property
    def slowest_window(self) -> int:
        """The window that takes longest."""
        return int(self.time_s.argmax())

    @property
    def slowest_name(self) -> str:
        """Its name."""
        number = self.slowest_window
        return f"window {number}" if self.windows is None else self.windows[number]

    @property
    def slowest_par(self) -> float:
        """PAR of the window that takes longest, averaged over layers."""
        return float(self.par[self.slowest_window].mean())

    @property
    def mean_par(self) -> float:
        """PAR averaged over windows and layers."""
        return float(self.par.mean())

    @property
    def worst_par(self) -> float:
        """PAR of the worst layer, averaged over windows."""
        return float(self.par.mean(0).max())

    @property
    def balancedness(self) -> float:
        """mean / max tokens per rank, averaged over windows and layers."""
        return float((1 / self.par).mean())

    @property
    def mean_time_s(self) -> float:
        """Priced time of all layers, averaged over windows."""
        return float(self.time_s.mean())

    @property
    def gap(self) -> float:
        """Mean time over the mean lower bound, minus one; 0 is optimal."""
        return float(self.time_s.mean() / self.lower_bound_s.mean() - 1)

    @property
    def objective_gap(self) -> float | None:
        """Objective over its bound, minus one; 0 is optimal."""
        if self.objective_s is None or self.objective_bound_s is None:
            return None
        return self.objective_s / self.objective_bound_s - 1

    @property
    def cost_s(self) -> float:
        """What plans are ranked by: the objective, or the mean time where no problem says one."""
        return self.mean_time_s if self.objective_s is None else self.objective_s

    @property
    def cost_gap(self) -> float:
        """`cost_s` over what no plan can beat, minus one."""
        return self.gap if self.objective_gap is None else self.objective_gap

    def to_dict(self) -> dict[str, float | str]:
        """What is known, as plain numbers: the entries of `cmjax place --json`."""
        found: dict[str, float | str] = {
            "mean_par": self.mean_par,
            "worst_par": self.worst_par,
            "balancedness": self.balancedness,
            "time_ms": self.mean_time_s * 1e3,
            "gap_to_bound": self.gap,
        }
        if self.objective_s is not None:
            found["objective_ms"] = self.objective_s * 1e3
        if self.objective_gap is not None:
            found["objective_gap_to_bound"] = self.objective_gap
        if len(self.time_s) > 1:
            found["slowest_workload"] = self.slowest_name
            found["slowest_workload_par"] = self.slowest_par
            found["slowest_workload_ms"] = float(self.time_s.max()) * 1e3
        if self.solve_s is not None:
            found["solve_s"] = self.solve_s
        if self.test is not None:
            found["test_time_ms"] = self.test.mean_time_s * 1e3
            found["test_mean_par"] = self.test.mean_par
        if self.step_par is not None:
            found["step_par"] = float(self.step_par.mean())
        if self.reach is not None:
            found["ranks_per_token"] = float(self.reach.ranks.mean())
            found["nodes_per_token"] = float(self.reach.nodes.mean())
        return found


def evaluate(plan: Plan, loads: Loads, layer_time_s: LayerTime) -> Score:
    """Score `plan` under `loads`, which need not be the loads it was made for.

    Every layer is priced, and bounded, as if all slots of the ranks that are alive might be filled.

    Args:
      plan: the placement.
      loads: of the plan's layers and experts, in the unit that the price expects.
      layer_time_s: the priced layer, see `pricing`.
    Raises: ValueError if the loads' layers and experts are not the plan's.

    >>> from cmjax.placement import Loads, Plan
    >>> plan = Plan([[0, 1, 2, 3]], 4, ranks=2)
    >>> found = evaluate(plan, Loads([[30.0, 10, 20, 40]]), lambda tokens: 1e-6 * tokens.max(-1))
    >>> found.mean_par, round(found.gap, 3)  # ranks get 40 and 60; an even share is 50
    (1.2, 0.2)
    """
    tokens = plan.tokens_per_rank(loads.counts)
    alive = tokens[..., plan.alive]
    dead = tuple(np.flatnonzero(~plan.alive).tolist())
    redundant = plan.slots - plan.experts
    problem = Problem(
        loads, plan.ranks, redundant, plan.nodes,
        without_ranks=dead, routing=plan.routing, rank_cost=plan.rank_cost,
    )  # fmt: skip
    return Score(
        par=alive.max(-1) / alive.mean(-1),
        time_s=price_s(layer_time_s, tokens).sum(-1),
        lower_bound_s=lower_bound_time_s(problem, layer_time_s).sum(-1),
        windows=loads.window_names,
    )


def evaluate_by_depth(plan: Plan, loads: Loads, price_of: Callable[[int], LayerTime]) -> Score:
    """`evaluate` for a plan from a file, which may fill more slots in one layer than in another.

    Layers are matched by number where both sides have numbers, else by position. Each layer is
    priced, and bounded, with the slots it has. The bound holds for uneven splits too: of an
    expert's copies, one serves at least its even share.

    Args:
      plan: the placement.
      loads: in the unit that the price expects (see `Loads.scaled`).
      price_of: `price_of(slots_per_rank)` is the layer's price with so many slots on every rank.
    Raises: ValueError of one line if layers or experts do not match.
    """
    plan, loads = align(plan, loads)
    depths = plan.filled.max(-1)
    par = np.empty(loads.counts.shape[:2])
    time_s, bound_s = np.zeros(len(par)), np.zeros(len(par))
    for depth in np.unique(depths):
        rows = np.flatnonzero(depths == depth)
        served = Loads(loads.counts[:, rows], loads.source)
        found = evaluate(plan.select(rows.tolist()), served, price_of(int(depth)))
        par[:, rows] = found.par
        time_s += found.time_s
        bound_s += found.lower_bound_s
    return Score(par=par, time_s=time_s, lower_bound_s=bound_s, windows=loads.window_names)
