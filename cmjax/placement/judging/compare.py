"""Methods side by side, judged where they planned and where they did not."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from cmjax.placement.judging.bounds import lower_bound_objective_s
from cmjax.placement.judging.evaluate import Evaluation, evaluate
from cmjax.placement.judging.multicast import Reach, group_ranks, reach
from cmjax.placement.judging.step_noise import step_par
from cmjax.placement.loads import Loads
from cmjax.placement.methods.place import OnStep, place
from cmjax.placement.methods.split import optimise_split
from cmjax.placement.plan import Plan
from cmjax.placement.pricing import LayerTime, price_s
from cmjax.placement.problem import Problem
from cmjax.placement.routes import Routes

BASELINES = ("contiguous", "random", "greedy", "hierarchical", "one-spare")
"""What every method is compared with."""


@dataclass(frozen=True, eq=False)
class Judged:
    """A plan and how good it is.

    Attributes:
      plan: the placement.
      made_for: under the loads it was made for.
      served: under later loads, or those of another domain; None if none were given.
      objective_s: the objective of the time of all layers.
      bound_s: what no plan's objective can beat.
      step_par: max / mean tokens per rank of sampled steps, by window and layer of `served` (else
        `made_for`); None if not asked for.
      reach: ranks and nodes a token goes to; None without routes.
      solve_s: seconds to make it.
    """

    plan: Plan
    made_for: Evaluation
    served: Evaluation | None
    objective_s: float
    bound_s: float
    step_par: Float[np.ndarray, "windows layers"] | None
    reach: Reach | None
    solve_s: float

    @property
    def gap(self) -> float:
        """Objective over its bound, minus one; 0 is optimal."""
        return self.objective_s / self.bound_s - 1


def compare(
    problem: Problem,
    methods: Sequence[str],
    layer_time_s: LayerTime,
    *,
    test: Loads | None = None,
    routes: Routes | None = None,
    group_by: Routes | None = None,
    step_assignments: int = 0,
    weighted: bool = False,
    shrink: float = 0.0,
    seed: int = 0,
    seconds: float | None = None,
    on_step: OnStep | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Judged]:
    """Plans of several methods, and how good each is.

    Args:
      problem: what is placed.
      methods: names of registered methods.
      layer_time_s: the priced layer.
      test: loads that the plans have not seen, in the same unit.
      routes: experts of every token and layer, to count the nodes that a token reaches.
      group_by: the same of tokens to plan with: methods other than the baselines then group their
        ranks into nodes so that experts chosen together meet (`group_ranks`).
      step_assignments: tokens of all ranks times experts per token of a sampled step; 0 for none.
      weighted: give the searched plan uneven shares per copy where that is faster.
      shrink: methods other than the baselines plan on loads so much nearer to even
        (`Loads.shrunk`), for texts unlike the recorded ones; judged they are on the loads given.
      seed, seconds, on_step: as in `place`.
      clock: what `solve_s` is measured by; `time.process_time` on a busy machine.
    Raises: ValueError for an unknown method, or test loads of other layers or experts.
    """
    plans, took_s = {}, {}
    expected = replace(problem, loads=problem.loads.shrunk(shrink))
    for method in methods:
        begin, made_for = clock(), problem if method in BASELINES else expected
        plan = place(made_for, method, layer_time_s, seed=seed, seconds=seconds, on_step=on_step)
        if method not in BASELINES:
            if weighted:
                plan = optimise_split(plan, made_for, layer_time_s)
            if group_by is not None:
                plan = group_ranks(plan, group_by)
        plans[method], took_s[method] = plan, clock() - begin
    bound_s = lower_bound_objective_s(problem, layer_time_s)
    return {
        method: judge_plan(
            plan, problem, layer_time_s, bound_s,
            test=test, routes=routes, step_assignments=step_assignments, seed=seed,
            solve_s=took_s[method],
        )
        for method, plan in plans.items()
    }  # fmt: skip


def judge_plan(
    plan: Plan,
    problem: Problem,
    layer_time_s: LayerTime,
    bound_s: float,
    *,
    test: Loads | None = None,
    routes: Routes | None = None,
    step_assignments: int = 0,
    seed: int = 0,
    solve_s: float = 0.0,
) -> Judged:
    """How good one plan is; arguments as in `compare`, with the bound of the problem."""
    noise = None
    if step_assignments:
        noise = step_par(plan, test or problem.loads, step_assignments, seed=seed)
    return Judged(
        plan=plan,
        made_for=evaluate(plan, problem.loads, layer_time_s),
        served=None if test is None else evaluate(plan, test, layer_time_s),
        objective_s=objective_s(plan, problem, layer_time_s),
        bound_s=bound_s,
        step_par=noise,
        reach=None if routes is None else reach(plan, routes),
        solve_s=solve_s,
    )


def objective_s(plan: Plan, problem: Problem, layer_time_s: LayerTime) -> float:
    """The problem's objective under a plan."""
    tokens = plan.tokens_per_rank(problem.loads.counts)
    return float(problem.objective(price_s(layer_time_s, tokens).sum(-1)))
