"""Methods side by side, judged where they planned and where they did not."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace

from cmjax.console import Progress
from cmjax.placement.judging.bounds import lower_bound_objective_s
from cmjax.placement.judging.multicast import group_ranks, reach
from cmjax.placement.judging.score import Score, evaluate
from cmjax.placement.judging.step_noise import step_par
from cmjax.placement.loads import Loads
from cmjax.placement.methods.place import place
from cmjax.placement.methods.split import optimize_split
from cmjax.placement.plan import Plan
from cmjax.placement.pricing import LayerTime, price_s
from cmjax.placement.problem import Problem
from cmjax.placement.routes import Routes

BASELINES = ("contiguous", "random", "greedy", "hierarchical", "one-spare")
"""What every method is compared with."""


@dataclass(frozen=True, eq=False)
class Judge:
    """What plans of a problem are judged by: `judge(plan) -> Score`.

    Attributes:
      problem: the loads that plans are made for, and the objective.
      layer_time_s: the priced layer.
      test: loads that the plans have not seen, in the same unit.
      routes: experts of every token and layer, to count the nodes that a token reaches.
      step_assignments: tokens of all ranks times experts per token of a sampled step, which is one
        of `test`, else of the problem's loads; 0 for none.
      seed: of the sampled steps.
    """

    problem: Problem
    layer_time_s: LayerTime
    _: KW_ONLY
    test: Loads | None = None
    routes: Routes | None = None
    step_assignments: int = 0
    seed: int = 0

    def __call__(self, plan: Plan, *, bound_s: float, solve_s: float) -> Score:
        """The score of a plan.

        Args:
          plan: of the problem.
          bound_s: what no plan's objective can beat (`lower_bound_objective_s`).
          solve_s: seconds that the plan took to make.
        Raises: ValueError for test loads of other layers or experts.
        """
        loads, test, noise = self.problem.loads, self.test, None
        if self.step_assignments:
            noise = step_par(plan, test or loads, self.step_assignments, seed=self.seed)
        return replace(
            evaluate(plan, loads, self.layer_time_s),
            objective_s=objective_s(plan, self.problem, self.layer_time_s),
            objective_bound_s=bound_s,
            step_par=noise,
            reach=None if self.routes is None else reach(plan, self.routes),
            solve_s=solve_s,
            test=None if test is None else evaluate(plan, test, self.layer_time_s),
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """Plans and their scores, both by method, and what no plan's objective can beat."""

    plans: Mapping[str, Plan]
    scores: Mapping[str, Score]
    objective_bound_s: float


def compare(
    judge: Judge,
    methods: Sequence[str],
    *,
    group_by: Routes | None = None,
    weighted: bool = False,
    shrink: float = 0.0,
    seed: int = 0,
    seconds: float | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Plans of several methods, and how good each is.

    Args:
      judge: the problem, its price, and what else plans are judged by.
      methods: names of registered methods.
      group_by: routes of tokens to plan with: methods other than the baselines then group their
        ranks into nodes so that experts chosen together meet (`group_ranks`).
      weighted: give the searched plan uneven shares per copy where that is faster.
      shrink: methods other than the baselines plan on loads so much nearer to even
        (`Loads.shrunk`), for texts unlike the recorded ones; judged they are on the loads given.
      seed, seconds, progress: as in `place`.
      clock: what `solve_s` is measured by; `time.process_time` on a busy machine.
    Raises: ValueError for an unknown method, or test loads of other layers or experts.
    """
    problem, layer_time_s = judge.problem, judge.layer_time_s
    plans, took_s = {}, {}
    expected = replace(problem, loads=problem.loads.shrunk(shrink))
    for method in methods:
        begin, made_for = clock(), problem if method in BASELINES else expected
        plan = place(made_for, method, layer_time_s, seed=seed, seconds=seconds, progress=progress)
        if method not in BASELINES:
            if weighted:
                plan = optimize_split(plan, made_for, layer_time_s)
            if group_by is not None:
                plan = group_ranks(plan, group_by)
        plans[method], took_s[method] = plan, clock() - begin
    bound_s = lower_bound_objective_s(problem, layer_time_s)
    scores = {
        method: judge(plan, bound_s=bound_s, solve_s=took_s[method])
        for method, plan in plans.items()
    }
    return Comparison(plans, scores, bound_s)


def objective_s(plan: Plan, problem: Problem, layer_time_s: LayerTime) -> float:
    """The problem's objective under a plan."""
    tokens = plan.tokens_per_rank(problem.loads.counts)
    return float(problem.objective(price_s(layer_time_s, tokens).sum(-1)))
