"""One step of training: loss and gradient on every rank, one optimizer for all of them.

Data and experts are spread over the same ranks. A rank's gradient of its own mean loss holds, for
its experts, what the tokens of *all* ranks say (the exchanges' transposes bring it); for shared
parameters it is summed over the ranks. Both are divided by the number of ranks, but for the load.

The load-balancing bias follows DeepSeek-V3 (report, section 2.1.2), without an auxiliary loss:

    b_e <- b_e - rate sign(load_e - mean load)

The router defines the derivative by `b` to be the load (`cmjax.models.moe.layers.router`).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float32, Int

from cmjax.mesh import RANKED, REPLICATED, RankMesh, on_every_rank
from cmjax.models.moe.generation.programs import place_params
from cmjax.models.moe.model import abstract_model
from cmjax.models.moe.parallelism import Parallelism
from cmjax.models.moe.sharding import param_specs, shard_params
from cmjax.models.moe.slots import ep_table
from cmjax.models.moe.steps import init_params
from train.moe.config import LanguageModelConfig

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a run carries from step to step.

    Attributes:
      params: parameters on the mesh; experts have a leading axis of ranks.
      optimizer: state of the optimizer.
    """

    params: Params
    optimizer: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step found.

    Attributes:
      loss: mean over all bytes, nats.
      gradient_norm: of everything but the balancing bias.
      load: rows of the busiest expert over the mean, the largest of all layers.
    """

    loss: Float32[Array, ""]
    gradient_norm: Float32[Array, ""]
    load: Float32[Array, ""]


def parallelism_of(config: LanguageModelConfig, mesh: RankMesh) -> Parallelism:
    """Experts over the ranks, and the rows reserved for them.

    Raises: ValueError: a batch or experts that the ranks do not divide.
    """
    if config.batch % mesh.ranks or config.experts % mesh.ranks:
        raise ValueError(
            f"--batch ({config.batch}) and --experts ({config.experts}) must be multiples of the "
            f"{mesh.ranks} ranks of --mesh {config.mesh}"
        )
    capacity = None
    if config.capacity_factor:
        tokens = config.batch // mesh.ranks * config.length
        mean = tokens * config.experts_per_token / config.experts
        capacity = min(tokens, math.ceil(config.capacity_factor * mean))
    axes = mesh.axes if mesh.ranks > 1 else ()
    return Parallelism(table=ep_table(config.experts, mesh.ranks), axes=axes, capacity=capacity)


def initial(config: LanguageModelConfig, mesh: RankMesh) -> TrainState:
    """Random parameters, the same on every mesh, and the optimizer's first state."""
    parallelism = parallelism_of(config, mesh)
    one = init_params(config.model, "float32", seed=config.seed)
    params = place_params(shard_params(one, parallelism), parallelism, mesh)
    return TrainState(params, optimizer(config).init(_trained(params)))


def one_rank_params(params: Params, config: LanguageModelConfig) -> Params:
    """Parameters of the one-rank model, from those of a mesh."""

    def gather(path, x):
        keys = [str(entry.key) for entry in path]
        x = np.asarray(x)
        if "experts" in keys:  # [ranks, layers, slots, ...] -> [layers, experts, ...]
            x = np.moveaxis(x, 0, 1)
            x = x.reshape(x.shape[0], -1, *x.shape[3:])
        return jnp.asarray(x)

    return jax.tree_util.tree_map_with_path(gather, params)


def optimizer(config: LanguageModelConfig) -> optax.GradientTransformation:
    """AdamW for all but the balancing bias, which takes steps of one size."""
    warm = max(1, config.steps // 10)
    peak = config.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        peak / warm, peak, warm, max(config.steps, warm + 1), peak / 10
    )
    adam = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=config.weight_decay),
    )

    def balance(load, params):
        del params
        return jax.tree.map(
            lambda x: -config.bias_rate * jnp.sign(x - jnp.mean(x, axis=-1, keepdims=True)), load
        )

    return optax.partition({"adam": adam, "balance": optax.stateless(balance)}, _labels)


def make_step(config: LanguageModelConfig, mesh: RankMesh) -> Callable:
    """`step(state, tokens [batch, length + 1]) -> (state, StepResult)`, compiled; the state
    is donated."""
    gradient, transform = make_gradient(config, mesh), optimizer(config)

    def step(state: TrainState, tokens: Int[Array, "batch length"]):
        loss, grads = gradient(state.params, tokens)
        trained = _trained(state.params)
        updates, optimizer_state = transform.update(grads, state.optimizer, trained)
        params = _whole(optax.apply_updates(trained, updates), state.params)
        labels = jax.tree.leaves(_labels(grads))
        leaves = list(zip(labels, jax.tree.leaves(grads), strict=True))
        norm = optax.tree.norm([g for label, g in leaves if label == "adam"])
        loads = [jnp.max(g / jnp.mean(g, axis=-1, keepdims=True)) for b, g in leaves if b != "adam"]
        return TrainState(params, optimizer_state), StepResult(
            loss, norm, jnp.max(jnp.stack(loads))
        )

    return jax.jit(step, donate_argnums=0)


def make_gradient(config: LanguageModelConfig, mesh: RankMesh) -> Callable:
    """`gradient(params, tokens) -> (mean loss, gradient)` over the mesh; of a balancing bias, the
    rows of every expert."""
    parallelism = parallelism_of(config, mesh)
    graph, shapes = abstract_model(config.model, parallelism, "float32")
    specs = param_specs(shapes, parallelism)
    trained_specs = _trained(specs, like=shapes)

    def of_rank(params, tokens):
        def loss_of(trained):
            return _loss(nnx.merge(graph, _whole(trained, params)), tokens)

        loss, grads = jax.value_and_grad(loss_of)(_trained(params))
        if parallelism.axes:
            loss = lax.pmean(loss, parallelism.axes)
            grads = jax.tree.map(
                lambda spec, g: g if spec is RANKED else lax.psum(g, parallelism.axes),
                trained_specs,
                grads,
            )
        mean = jax.tree.map(
            lambda label, g: g / parallelism.ranks if label == "adam" else g, _labels(grads), grads
        )
        return loss, mean

    lifted = on_every_rank(of_rank, mesh, (specs, RANKED), (REPLICATED, trained_specs))

    def gradient(params, tokens):
        return lifted(params, tokens.reshape(mesh.ranks, -1, tokens.shape[-1]))

    return gradient


def _loss(model, tokens) -> Float32[Array, ""]:
    """Mean cross-entropy of the next byte, nats."""
    logits = model(tokens[:, :-1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


def _trained(tree: Any, like: Any = None) -> Any:
    """Floating-point leaves; `None` for the others (the tables of slots)."""
    like = tree if like is None else like
    return jax.tree.map(
        lambda x, shape: x if jnp.issubdtype(shape.dtype, jnp.floating) else None, tree, like
    )


def _whole(trained: Any, params: Any) -> Any:
    """`_trained` leaves, and the others of `params`."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, trained, params, is_leaf=lambda x: x is None
    )


def _labels(tree: Any) -> Any:
    def label(path, _):
        return "balance" if [str(p.key) for p in path][-2:] == ["router", "bias"] else "adam"

    return jax.tree_util.tree_map_with_path(label, tree)
