"""The one join of a layer's price and a placement: what a MoE layer costs under tokens per rank.

The slowest rank sets the time. Traced once, the layer is priced at 129 row counts from none to all
rows on one rank, evenly in their square root, and interpolated in between; it is piecewise linear
in the rows, so only the few pieces that contain a kink are inexact.

A dispatch kernel may send a token to a rank once, whatever experts of its are there, and the rank
return their weighted sum. A token whose k experts are chosen independently, each on rank r with the
share p = x[r] / sum(x) of the rows x, then crosses the links as

    d[r] = sum(x) / k · (1 - (1 - p)**k)    rows, in place of x[r],

which needs counts only (`cmjax.occupancy`). Experts that are chosen together more often than that,
and share a rank, save more.
"""

from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from cmjax.cost.price import price
from cmjax.cost.ranks import mesh_spread
from cmjax.deploy.moe_step import build_layer
from cmjax.deploy.step import MoEStep
from cmjax.hardware import Supernode
from cmjax.occupancy import reach_probability
from cmjax.placement import Loads, with_shared
from cmjax.primitives.exchange import round_trip_bytes

_POINTS = 129
_OFF = 1e-3  # by how much a total may miss the step's assignments: float32 sums, not other loads


@dataclass(frozen=True, eq=False)
class LayerPrice:
    """Priced time of a MoE layer as a function of the tokens on its ranks: a `LayerTime`.

    `price(tokens_per_rank)` takes `[..., ranks]` token copies of one step and returns seconds
    `[...]`; it can be traced and differentiated. The copies of all ranks must be those that the
    step routes, which `scale` makes of any counts.

    Attributes:
      model: whose hidden and expert sizes the layer has: a preset or the path of a `config.json`.
      machine: where it runs.
      ranks: expert-parallel ranks (dies).
      experts: routed experts of the layer, whatever the model has.
      redundant: extra slots, over all ranks together, shared experts' included.
      tokens: tokens that a rank routes per step.
      nodes: nodes the ranks are spread over (default: as few as hold them).
      shared: shared experts that live in slots, and get every token.
      multicast: a token goes to a rank once and comes back summed (independent experts, see the
        module's docstring); else every copy crosses for itself, as FusedDispatch sends them.
      unequal: ranks cost unequally, and tokens are counted in ordinary ones
        (`cmjax.placement.rank_cost`), whose sum depends on the plan and is not checked.
    Raises: ValueError for an unknown model, ranks that the machine does not have or that do not
      spread over its nodes, slots that do not divide over them, or tokens below 1.

    >>> from cmjax.hardware import load_machine
    >>> from cmjax.placement import Loads
    >>> price = LayerPrice("deepseek-r1", load_machine("cloudmatrix384"), ranks=8, experts=32,
    ...                    redundant=8, tokens=96)
    >>> loads = price.scale(Loads([[*range(1, 33)]]))
    >>> price.assignments, float(loads.counts.sum())  # 96 tokens of 8 experts on 8 ranks
    (6144.0, 6144.0)
    >>> price.row_bytes
    22016
    """

    model: str
    machine: Supernode
    _: KW_ONLY
    ranks: int
    experts: int
    redundant: int
    tokens: float
    nodes: int | None = None
    shared: int = 0
    multicast: bool = False
    unequal: bool = False

    def __post_init__(self):
        if not self.tokens >= 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        # Traced and priced layers are kept by machine, which plain numbers make hashable.
        object.__setattr__(self, "machine", jax.tree.map(float, self.machine))
        _ = self.layer  # what the machine or the model does not allow is refused here

    def __call__(self, tokens_per_rank: ArrayLike) -> Float[Array, "*batch"]:
        """Seconds of the layer.

        Args:
          tokens_per_rank: token copies on each rank, `[..., ranks]`.
        Raises: ValueError where the copies of all ranks are not those of a step (`scale` was
          forgotten), unless they are being traced.
        """
        tokens_per_rank = jnp.asarray(tokens_per_rank)
        total = jnp.sum(tokens_per_rank, axis=-1)
        if self.unequal:
            total = jnp.full_like(total, self.assignments)
        elif not isinstance(total, Tracer):
            self._refuse_other_totals(np.asarray(total))
        slowest = jnp.max(tokens_per_rank, axis=-1)
        curve = self._curve
        if not self.multicast:
            return curve.at(slowest, curve.seconds)
        total = jnp.maximum(total, 1e-30)
        reached = reach_probability(jnp.minimum(slowest / total, 1), self.copies)
        arriving = total / self.copies * reached
        return curve.at(slowest, curve.seconds - curve.crossing) + curve.at(
            arriving, curve.crossing
        )

    @property
    def layer(self) -> MoEStep:
        """The priced block, whose sizes are `tokens` per rank and `rows` on the slowest one."""
        return _block(self._shape)

    @property
    def copies(self) -> int:
        """Routed experts per token."""
        return self.layer.copies

    @property
    def assignments(self) -> float:
        """Token copies of one step: tokens × ranks × experts per token, shared ones included."""
        return float(self.tokens) * self.ranks * (self.copies + self.shared)

    @property
    def slots_per_rank(self) -> int:
        return self.layer.expert_slots // self.ranks

    @property
    def hidden(self) -> int:
        """Values of a token."""
        return self.layer.args[-1].shape[-1]  # the block's input, [ranks, tokens, hidden]

    @property
    def row_bytes(self) -> float:
        """Bytes that a copy of a token puts on the links, dispatched as INT8 and combined."""
        itemsize = self.layer.args[-1].dtype.itemsize
        return round_trip_bytes(self.hidden, quantize=True, itemsize=itemsize)

    @property
    def expert_bytes(self) -> float:
        """Weights of one expert of this layer: what a slot more adds to a rank."""
        leaves = jax.tree.leaves(self.layer.args[0]["experts"])  # [ranks, slots_per_rank, ...]
        held = sum(float(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        return held / self.layer.expert_slots

    @property
    def spread(self) -> int:
        """Nodes that the ranks are on."""
        return self.nodes or mesh_spread(self.ranks, self.machine).nodes

    def scale(self, loads: Loads) -> Loads:
        """Counts of routed experts as the token copies of one step, window by window.

        Shared experts are added, numbered after the routed ones.

        Raises: ValueError for counts of another number of experts.
        """
        if loads.experts != self.experts:
            raise ValueError(
                f"{loads.source}: the layer is priced for {self.experts} experts, the loads count "
                f"{loads.experts}"
            )
        return with_shared(loads, self.shared, self.copies).scaled(self.assignments)

    def with_slots(self, slots_per_rank: int) -> "LayerPrice":
        """The same layer with so many slots on every rank."""
        return replace(self, redundant=slots_per_rank * self.ranks - self.experts)

    @property
    def _curve(self) -> "_Curve":
        return _sampled(self._shape, float(self.tokens))

    @property
    def _shape(self) -> "_Shape":
        experts, redundant = self.experts + self.shared, self.redundant - self.shared
        return _Shape(self.model, self.machine, self.ranks, self.nodes, experts, redundant)

    def _refuse_other_totals(self, total) -> None:
        off = np.abs(total - self.assignments) > _OFF * self.assignments
        if off.any():
            raise ValueError(
                f"LayerPrice: expected the {self.assignments:,.0f} token copies of a step of "
                f"{self.tokens:g} tokens on {self.ranks} ranks, got {total[off].flat[0]:,.6g}; "
                f"LayerPrice.scale makes them of counts"
            )


class _Shape(NamedTuple):
    """What a traced block depends on."""

    model: str
    machine: Supernode
    ranks: int
    nodes: int | None
    experts: int
    redundant: int


class _Curve(NamedTuple):
    """Seconds by the rows on the slowest rank, and those that rows are on the links."""

    rows: np.ndarray
    seconds: np.ndarray
    crossing: np.ndarray

    def at(self, rows, values):
        return jnp.interp(rows, jnp.asarray(self.rows), jnp.asarray(values), right="extrapolate")


@lru_cache(maxsize=64)
def _block(shape: _Shape) -> MoEStep:
    model, machine, *_ = shape
    with jax.enable_x64(False):
        return build_layer(
            model, machine,
            ranks=shape.ranks, nodes=shape.nodes, experts=shape.experts, redundant=shape.redundant,
        )  # fmt: skip


@lru_cache(maxsize=64)
def _sampled(shape: _Shape, tokens: float) -> _Curve:
    layer, machine = _block(shape), shape.machine
    with jax.enable_x64(False):  # whoever asks first: the layer's integers have 4 bytes
        program = layer.trace()
    rows = np.linspace(0.0, 1.0, _POINTS) ** 2 * (tokens * layer.copies * layer.ranks)
    with jax.enable_x64(True):

        def at(rows):
            timeline = price(program, machine, layer.symbols({"tokens": tokens, "rows": rows}))
            crossing = sum(
                jnp.sum(jnp.where(part.fabric > 0, part.total, 0.0)) for part in timeline.parts
            )
            return timeline.total_s, crossing

        seconds, crossing = map(np.asarray, jax.jit(jax.vmap(at))(jnp.asarray(rows)))
    return _Curve(rows, seconds, crossing)
