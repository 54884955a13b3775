"""Online rebalancing: a new plan only where its gain pays for moving the weights.

A migration of some layers costs the service

    cost_s = stall_s + sum over its layers of (layer_stall_s + wire_s · (interference or 1)),

with `interference` where weights move beside the running step, 1 where it waits for them. It saves
`saving_s` a step, so it breaks even after cost_s / saving_s steps, and pays if the load stays as it
is for longer than that.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from cmjax.hardware import Supernode
from cmjax.placement.loads import Loads
from cmjax.placement.methods.place import check_method, place
from cmjax.placement.online.migration import Transfer, match, transfers, wire_s
from cmjax.placement.pricing import LayerTime, price_s
from cmjax.placement.problem import Plan, Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class MigrationCost:
    """What moving weights costs a running service.

    Attributes:
      expert_bytes: weights of one expert in one layer.
      stall_s: standstill per migration, however few layers move.
      layer_stall_s: standstill per layer that moves. The defaults of both are what users of SGLang
        measured (github.com/sgl-project/sglang, issue 7879: about 1 s and 20 ms per layer).
      overlapped: weights move beside the running step, which `exchange.interference` slows; else
        the step waits for them.
    """

    expert_bytes: float
    stall_s: float = 1.0
    layer_stall_s: float = 0.02
    overlapped: bool = False

    def __post_init__(self):
        if not 0 < self.expert_bytes < math.inf:
            raise ValueError(
                f"MigrationCost: expert_bytes must be positive, got {self.expert_bytes}"
            )
        for name in ("stall_s", "layer_stall_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"MigrationCost: {name} must be 0 or more, got {getattr(self, name)}"
                )


@dataclasses.dataclass(frozen=True, eq=False)
class Proposal:
    """A plan that was considered, and whether it pays.

    Attributes:
      plan: what to run from now on: the considered plan if it pays, else the current one.
      transfers: what has to be sent for the considered plan; to be carried out only if `pays`.
      saving_s: seconds saved per step in the newest interval, by the lesser of this plan's saving
        and that of one made without the interval; negative if it would be slower.
      cost_s: seconds of service that the migration costs.
      break_even_steps, break_even_s: after how many steps, and how long, the saving has paid for
        the cost; infinite if nothing is saved.
      pays: whether that is within the horizon.
      reason: the decision in one line.
    """

    plan: Plan
    transfers: tuple[Transfer, ...]
    saving_s: float
    cost_s: float
    break_even_steps: float
    break_even_s: float
    pays: bool
    reason: str

    @property
    def moved_bytes(self) -> float:
        """Weights that cross a link."""
        return sum(sent.bytes for sent in self.transfers if sent.source != sent.target)


class Rebalancer:
    """Takes the counts of each interval and proposes plans that pay.

    A plan is made from the decayed history. What it is worth is told by its like from the history
    *before* the newest interval, priced on the newest: what only fits the past gains nothing.
    Layers whose own saving does not pay for their own transfers stay as they are. Ranks that hold
    nothing now, as dead ones do, get nothing, and no layer uses more slots of a rank than it fills
    now on its fullest one.

        for counts in recorder:                 # [layers, experts]
            proposal = rebalancer.propose(counts)
            if proposal.pays:
                engine.migrate(proposal.transfers)
                rebalancer.adopt(proposal)

    >>> from cmjax.hardware import load_machine
    >>> plan = Plan([[0, 1, 2, 3]], experts=4, ranks=2)
    >>> rebalancer = Rebalancer(
    ...     plan, lambda tokens: 1e-7 * tokens.max(-1), load_machine("cloudmatrix384"),
    ...     cost=MigrationCost(expert_bytes=44e6), assignments_per_step=1000, horizon_steps=200_000)
    >>> proposals = [rebalancer.propose(np.array([[40, 40, 10, 10]])) for _ in range(2)]
    >>> [found.pays for found in proposals], len(proposals[1].transfers)
    ([False, True], 2)
    >>> round(proposals[1].saving_s * 1e6)  # µs: 500 tokens on a rank and not 800, 100 ns each
    30
    """

    def __init__(
        self,
        plan: Plan,
        layer_time_s: LayerTime,
        machine: Supernode,
        *,
        cost: MigrationCost,
        assignments_per_step: float,
        horizon_steps: float,
        other_step_s: float = 0.0,
        method: str = "greedy",
        groups: int = 1,
        decay: float = 0.5,
        seconds: float | None = None,
        seed: int = 0,
    ):
        """
        Args:
          plan: what runs now.
          layer_time_s: the priced MoE layer, in tokens of one step; see `pricing`.
          machine: whose links the weights cross.
          cost: what a migration costs.
          assignments_per_step: tokens × top-k per layer and step, which counts are scaled to.
          horizon_steps: steps for which the load is trusted to stay as it is; at most those until
            the next migration.
          other_step_s: the step's time outside its MoE layers; only turns steps into seconds.
          method: name of a registered placement method.
          groups: the router's expert groups, for methods that keep them together.
          decay: weight of the past at each interval, 0 (forget) to below 1.
          seconds, seed: of the method.
        Raises: ValueError for an unknown method or a number out of its range.
        """
        check_method(method)
        for name, number in (
            ("assignments_per_step", assignments_per_step),
            ("horizon_steps", horizon_steps),
        ):
            if not 0 < number < math.inf:
                raise ValueError(f"Rebalancer: {name} must be positive, got {number}")
        if not 0 <= decay < 1:
            raise ValueError(f"Rebalancer: decay must lie in [0, 1), got {decay}")
        if not 0 <= other_step_s < math.inf:
            raise ValueError(f"Rebalancer: other_step_s must be 0 or more, got {other_step_s}")
        self.plan = plan
        self._layer_time_s, self._machine, self._cost = layer_time_s, machine, cost
        self._assignments, self._horizon = float(assignments_per_step), float(horizon_steps)
        self._other_step_s, self._decay = float(other_step_s), float(decay)
        self._method, self._groups, self._seconds, self._seed = method, groups, seconds, seed
        self._history: np.ndarray | None = None

    def propose(self, counts: Float[np.ndarray, "layers experts"]) -> Proposal:
        """Take the newest interval's counts and consider a new plan.

        Raises: ValueError, one line, for counts that are not this model's or no counts.
        """
        newest = Loads(np.asarray(counts), "Rebalancer.propose")
        if newest.counts.shape != (1, self.plan.layers, self.plan.experts):
            raise ValueError(
                f"Rebalancer.propose: expected counts of shape [{self.plan.layers}, "
                f"{self.plan.experts}], got {np.shape(counts)}"
            )
        past, self._history = self._history, newest.counts[0]
        if past is None:
            return self._stay("first interval: nothing to plan from yet")
        self._history = self._decay * past + newest.counts[0]
        found, trial = self._planned(self._history), self._planned(past)
        return self._consider(found, trial, newest.scaled(self._assignments))

    def adopt(self, proposal: Proposal) -> None:
        """From now on `proposal.plan` is what runs."""
        self.plan = proposal.plan

    def _planned(self, past):
        loads = Loads(past, "Rebalancer: history").scaled(self._assignments)
        problem = Problem(
            loads, self.plan.ranks, self.plan.slots - self.plan.experts, self.plan.nodes,
            self._groups,
            without_ranks=tuple(np.flatnonzero(~self.plan.alive).tolist()),
            slots_by_layer=tuple(self.plan.filled.max(-1).tolist()),
            rank_cost=self.plan.rank_cost,
        )  # fmt: skip
        found = place(
            problem, self._method, self._layer_time_s, seed=self._seed, seconds=self._seconds
        )
        return match(self.plan, found)

    def _consider(self, found, trial, newest):
        before, *later = (
            price_s(self._layer_time_s, plan.tokens_per_rank(newest.counts[0]))
            for plan in (self.plan, found, trial)
        )
        after = np.maximum(*later)
        moved = transfers(self.plan, found, self._machine, expert_bytes=self._cost.expert_bytes)
        wire = wire_s(moved, self.plan, self._machine)
        if self._cost.overlapped:
            wire = wire * float(self._machine.exchange.interference)
        refilled = (self.plan.expert_of_slot != found.expert_of_slot).any(-1)
        layer_cost = np.where(refilled, self._cost.layer_stall_s + wire, 0.0)
        changed = refilled | (self.plan.split_of_slot != found.split_of_slot).any(
            -1
        )  # new shares move nothing
        if not changed.any():
            return self._stay("the same plan as now")

        worth = changed & ((before - after) * self._horizon > layer_cost)
        # Where no layer pays for itself, say what all of them together would have cost.
        chosen = worth if worth.any() else changed
        saving = float((before - after)[chosen].sum())
        cost = self._cost.stall_s * bool(refilled[chosen].any()) + float(layer_cost[chosen].sum())
        steps = cost / saving if saving > 0 else math.inf
        step_s = self._other_step_s + float(before.sum()) - saving
        pays = bool(worth.any()) and steps < self._horizon
        reason = (
            f"{int(chosen.sum())} of {len(chosen)} layers: {_signed(saving)} of "
            f"{1e3 * before.sum():.3g} ms a step for a cost of {cost:.3g} s; "
            + (f"even after {steps:,.0f} steps" if saving > 0 else "never even")
            + f", horizon {self._horizon:,.0f}: {'move' if pays else 'do not move'}"
        )
        return Proposal(
            plan=_mixed(self.plan, found, chosen) if pays else self.plan,
            transfers=tuple(sent for sent in moved if chosen[sent.layer]),
            saving_s=saving,
            cost_s=cost,
            break_even_steps=steps,
            break_even_s=steps * step_s,
            pays=pays,
            reason=reason,
        )

    def _stay(self, reason):
        return Proposal(self.plan, (), 0.0, 0.0, math.inf, math.inf, False, f"{reason}: stay")


def _mixed(current, found, chosen):
    """The layers `chosen` of one plan and the others of the other, slots and shares."""
    pick = chosen[:, None]
    split = None
    if current.split is not None or found.split is not None:
        split = np.where(pick, found.split_of_slot, current.split_of_slot)
    experts = np.where(pick, found.expert_of_slot, current.expert_of_slot)
    return dataclasses.replace(current, expert_of_slot=experts, split=split)


def _signed(saving):
    return f"{'saves' if saving >= 0 else 'loses'} {1e6 * abs(saving):,.3g} µs"
