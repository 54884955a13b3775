"""The pieces of which a training step of a mixture of experts is made, differentiated and traced.

They are layers of `cmjax.models.moe` and the ends of the model, like those of a dense decoder
(`cmjax.parallelism.pieces`), with dispatch, combine and their transposes over the ranks that share
experts.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cmjax.hardware import TIERS
from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.balancing import is_load
from cmjax.models.moe.config import LayerKind, MoEConfig
from cmjax.models.moe.parallelism import Parallelism
from cmjax.models.moe.slots import ep_table
from cmjax.models.moe.trained import trained, with_tables
from cmjax.parallelism.expert_program import EndsProgram, LayerProgram, of_experts
from cmjax.parallelism.memory import MIXED
from cmjax.parallelism.pieces import BATCH, batch_symbol, kept_bytes
from cmjax.parallelism.plan import Plan, Recompute
from cmjax.parallelism.pricing import On
from cmjax.program import Program, Size, trace

_AXIS, _CONTEXT = "expert", "context"
_HALF = jnp.dtype(MIXED.dtype).name


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoETraining:
    """What is trained: a mixture of experts, on sequences of some length."""

    model: MoEConfig
    sequence: int

    def __post_init__(self):
        if self.model.dense:
            raise ValueError("MoETraining: the model has no layers with experts")

    @property
    def layers(self) -> dict[LayerKind, int]:
        """How many there are of each kind."""
        counts: dict[LayerKind, int] = {
            "moe": self.model.moe_layers,
            "dense": len(self.model.dense_layers),
        }
        return {kind: count for kind, count in counts.items() if count}

    @property
    def parameters(self) -> int:
        """Of the model, without its modules that predict further tokens."""
        layers = [(n, layer_piece(self, k, "none")) for k, n in self.layers.items()]
        return sum(n * (each.shared + each.experts) for n, each in [*layers, (1, ends_piece(self))])

    def flops_per_token(self) -> float:
        """Three times the matrix products of a forward pass, of one token."""
        return _flops_per_token(self)

    def stages(self, plan: Plan) -> list[range]:
        """The layers of every stage: where a plan does not say, as many on each, and on the last
        ones what is left."""
        layers, p = self.model.layers, plan.pipeline
        numbers = plan.layers or [math.ceil(layers / p)] * p
        ends = [min(sum(numbers[:stage]), layers) for stage in range(p + 1)]
        return [range(*pair) for pair in itertools.pairwise(ends)]

    def check(self, plan: Plan, global_batch: int) -> None:
        """Raises: ValueError: a degree that does not divide what it splits."""
        experts, share, context = self.model.routed_experts, plan.expert, plan.context
        if plan.data % share or experts % share:
            raise ValueError(
                f"plan: expert={share} must divide data={plan.data} and the {experts} experts"
            )
        if plan.data % context or self.sequence % context or (share > 1 and share % context):
            raise ValueError(
                f"plan: context={context} must divide data={plan.data}, the sequence of "
                f"{self.sequence} tokens and, but for expert=1, expert={share}"
            )
        if plan.tensor * plan.interleave > 1 or plan.sequence_parallel:
            raise ValueError(
                "plan: a mixture of experts is priced with tensor=1, interleave=1 and "
                "sequence_parallel=false"
            )
        _ = plan.recompute_of_all  # refuses what differs from layer to layer
        plan.check_stages(self.model.layers)
        if global_batch % (plan.replicas * plan.micro_batch):
            shared = f" / context={context}" if context > 1 else ""
            raise ValueError(
                f"plan: data={plan.data}{shared} x micro_batch={plan.micro_batch} does not divide "
                f"the global batch of {global_batch}"
            )


def dimensions(plan: Plan) -> dict[str, int]:
    """Degrees of a plan's dimensions from neighbours outward: its stages, its replicas, and, of
    these, those in a row that share experts, and of those, or without any, those that share
    sequences (`context`, where they do)."""
    group, context = max(plan.expert, plan.context), plan.context
    degrees = {
        "context": context,
        "expert": group // context,
        "replicas": plan.data // group,
        "pipeline": plan.pipeline,
    }
    own = ("context", "expert", "replicas") if context > 1 else ("expert", "replicas")
    inner = {"tensor": (), "pipeline": ("pipeline",), "data": own}
    return {name: degrees[name] for each in plan.order for name in inner[each]}


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Ranks that have a part each of a layer's experts, and of sequences.

    Fields:
      expert, context: how many. on, context_on: by tier, of those that differ in the one but not in
        the other, and of those that share sequences.
    """

    expert: int = 1
    context: int = 1
    on: On = (1, 1, 1)
    context_on: On = (1, 1, 1)

    @property
    def axes(self) -> dict[str, On]:
        """Mesh axes of what is split, from outside inward, and where their ranks are."""
        both = {_AXIS: self.on, _CONTEXT: self.context_on}
        return {name: on for name, on in both.items() if math.prod(on) > 1}

    @property
    def parallelism(self) -> dict[str, Any]:
        """The fields of a `Parallelism`."""
        return {
            "axes": tuple(self.axes) if self.expert > 1 else (),
            "context": self.context,
            "context_axes": (_CONTEXT,) if self.context > 1 else (),
        }


ALONE = Sharing()


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertPiece:
    """A layer or an end on one rank: its programs, parameters that every replica holds and those
    of its experts, the balancing biases among the former, and bytes that it keeps of a micro-batch
    between the passes."""

    forward: Callable[[], Program]
    both: Callable[[], Program]
    shared: int
    experts: int
    loads: int
    kept: Size


@functools.lru_cache(maxsize=64)
def _flops_per_token(training: MoETraining) -> float:
    """Three times the matrix products of a forward pass on one rank."""
    whole = {BATCH: 1.0}
    programs = [(n, layer_piece(training, k, "none")) for k, n in training.layers.items()]
    flops = 0.0
    for count, piece in [*programs, (1, ends_piece(training))]:
        totals = piece.forward().totals(whole)
        flops += count * sum(totals[f"cube_flops_{bits}bit"] for bits in (8, 16, 32))
    return 3 * float(flops) / training.sequence


@functools.lru_cache(maxsize=512)
def layer_piece(
    training: MoETraining,
    kind: LayerKind,
    recompute: Recompute,
    sharing: Sharing = ALONE,
    dtype: str = _HALF,
) -> ExpertPiece:
    """A layer on one of the ranks that share it."""
    arithmetic = Arithmetic.of(dtype)
    model, batch = training.model, batch_symbol()
    length = training.sequence // sharing.context
    parallelism = Parallelism(
        table=ep_table(model.routed_experts, sharing.expert),
        # As many rows as tokens send on average: nobody is busier than others.
        capacity=batch * length * model.experts_per_token // model.routed_experts,
        **sharing.parallelism,
    )
    run = LayerProgram(model, parallelism, kind, recompute, arithmetic)
    x = jax.ShapeDtypeStruct((batch, length, model.hidden_size), arithmetic.dtype)
    return _piece(run, run.shapes, x, sharing)


@functools.lru_cache(maxsize=64)
def ends_piece(training: MoETraining, context: int = 1, dtype: str = _HALF) -> ExpertPiece:
    """Embedding, final norm, head and loss, as one piece on one rank, of its part of sequences."""
    batch, arithmetic = batch_symbol(), Arithmetic.of(dtype)
    ends = EndsProgram(training.model, arithmetic)
    tokens = jax.ShapeDtypeStruct((batch, training.sequence // context), jnp.int32)

    def run(params, x, tokens):
        return ends.loss(params, x + ends.embed(params, tokens), tokens)

    x = jax.ShapeDtypeStruct((*tokens.shape, training.model.hidden_size), arithmetic.dtype)
    return _piece(run, ends.shapes, x, ALONE, tokens)


def _piece(run: Callable, params: Any, x, sharing: Sharing, *fixed) -> ExpertPiece:
    floats = trained(params)
    sums = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), floats)

    def call(floats, params, x, *fixed):
        return run(with_tables(floats, params), x, *fixed)

    def forward(params, x, *fixed):
        return call(trained(params), params, x, *fixed)

    def pulled(params, x, *fixed):
        return jax.vjp(lambda f, x: call(f, params, x, *fixed), trained(params), x)

    def both(params, sums, x, *fixed):
        y, back = pulled(params, x, *fixed)
        grads, sent = back(jnp.ones_like(y) if y.ndim == 0 else y)
        return jax.tree.map(lambda a, g: a + jnp.asarray(g, a.dtype), sums, grads), sent

    axes = {name: math.prod(on) for name, on in sharing.axes.items()} or None
    tiers: Any = axes and {
        name: {tier: n for tier, n in zip(TIERS, on, strict=True) if n > 1}
        for name, on in sharing.axes.items()
    }

    def read(fn, *args):
        return trace(fn, *args, axis_sizes=axes, tiers=tiers, at={BATCH: 1.0})

    leaves = jax.tree_util.tree_leaves_with_path(floats)
    held = sum(leaf.size for _, leaf in leaves)
    experts = sum(leaf.size for path, leaf in leaves if of_experts(path))
    residuals: Callable[..., list[Array]] = lambda *a: jax.tree.leaves(pulled(*a)[1])  # noqa: E731
    return ExpertPiece(
        forward=functools.cache(lambda: read(forward, params, x, *fixed)),
        both=functools.cache(lambda: read(both, params, sums, x, *fixed)),
        shared=held - experts,
        experts=experts,
        loads=sum(leaf.size for path, leaf in leaves if is_load(path)),
        kept=kept_bytes(residuals, list((axes or {}).items()), params, x, *fixed),
    )
