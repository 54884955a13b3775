"""One step of training: loss and gradient on every rank, one optimizer for all of them.

Data and experts are spread over the same ranks. A rank's gradient of its own mean loss holds, for
its experts, what the tokens of *all* ranks say (the exchanges' transposes bring it); for shared
parameters it is summed over the ranks. Both are divided by the number of ranks, but for the load.

Load is balanced by the routers' biases (`cmjax.models.moe.balancing`).
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
from jax.sharding import NamedSharding
from jaxtyping import Array, Float32, Int

from cmjax.mesh import RANKED, REPLICATED, RankMesh, on_every_rank
from cmjax.models.moe.balancing import balanced, is_load
from cmjax.models.moe.generation.programs import place_params
from cmjax.models.moe.model import abstract_model
from cmjax.models.moe.parallelism import Parallelism
from cmjax.models.moe.sharding import param_specs, shard_params
from cmjax.models.moe.slots import ep_table
from cmjax.models.moe.steps import init_params
from cmjax.models.moe.trained import trained, with_tables
from cmjax.processes import on_host, on_mesh
from train.moe.config import LanguageModelConfig
from train.schedule import warmed_up

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
    state = optimizer(config).init(trained(params))

    def placed(x):  # moments are where the parameters are, counts are not
        return x if isinstance(x.sharding, NamedSharding) else on_mesh(x, mesh, REPLICATED)

    return TrainState(params, jax.tree.map(placed, state))


def one_rank_params(params: Params, config: LanguageModelConfig) -> Params:
    """Parameters of the one-rank model, from those of a mesh."""

    def gather(path, x):
        keys = [str(entry.key) for entry in path]
        if "experts" in keys:  # [ranks, layers, slots, ...] -> [layers, experts, ...]
            x = np.moveaxis(x, 0, 1)
            x = x.reshape(x.shape[0], -1, *x.shape[3:])
        return jnp.asarray(x)

    return jax.tree_util.tree_map_with_path(gather, on_host(params))


def optimizer(config: LanguageModelConfig) -> optax.GradientTransformation:
    """AdamW for all but the balancing bias, which takes steps of one size."""
    rate = warmed_up(config.learning_rate, config.steps)
    adam = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=config.weight_decay),
    )
    return balanced(adam, config.bias_rate)


def make_step(config: LanguageModelConfig, mesh: RankMesh) -> Callable:
    """`step(state, tokens [batch, length + 1]) -> (state, StepResult)`, compiled; the state
    is donated."""
    gradient, transform = make_gradient(config, mesh), optimizer(config)

    def step(state: TrainState, tokens: Int[Array, "batch length"]):
        loss, grads = gradient(state.params, tokens)
        floats = trained(state.params)
        updates, optimizer_state = transform.update(grads, state.optimizer, floats)
        params = with_tables(optax.apply_updates(floats, updates), state.params)
        leaves = jax.tree_util.tree_leaves_with_path(grads)
        norm = optax.tree.norm([g for path, g in leaves if not is_load(path)])
        loads = [g / jnp.mean(g, axis=-1, keepdims=True) for path, g in leaves if is_load(path)]
        busiest = jnp.max(jnp.stack([jnp.max(load) for load in loads]))
        return TrainState(params, optimizer_state), StepResult(loss, norm, busiest)

    return jax.jit(step, donate_argnums=0)


def make_gradient(config: LanguageModelConfig, mesh: RankMesh) -> Callable:
    """`gradient(params, tokens) -> (mean loss, gradient)` over the mesh; of a balancing bias, the
    rows of every expert."""
    parallelism = parallelism_of(config, mesh)
    graph, shapes = abstract_model(config.model, parallelism, "float32")
    specs = param_specs(shapes, parallelism)
    trained_specs = trained(specs, like=shapes)

    def of_rank(params, tokens):
        def loss_of(floats):
            return _loss(nnx.merge(graph, with_tables(floats, params)), tokens)

        loss, grads = jax.value_and_grad(loss_of)(trained(params))
        if parallelism.axes:
            loss = lax.pmean(loss, parallelism.axes)
            grads = jax.tree.map(
                lambda spec, g: g if spec is RANKED else lax.psum(g, parallelism.axes),
                trained_specs,
                grads,
            )
        mean = jax.tree_util.tree_map_with_path(
            lambda path, g: g if is_load(path) else g / parallelism.ranks, grads
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
