"""One optimiser step, data-parallel over emulated devices; one device is the case of one rank."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from cmjax.mesh import RANKED, REPLICATED, RankMesh, on_every_rank
from cmjax.models.asr.acoustic import AcousticModel, Statistics
from cmjax.models.asr.augment import colour, spec_augment, warp_vocal_tract
from cmjax.models.asr.conv import Record, Scale
from cmjax.models.asr.features import log_mel
from train.asr.config import Config, Loss
from train.asr.objective import Parts, shares
from train.data.batches import Batch, Framing

Params = dict[str, Any]  # "weights" and "scales": nested dicts of arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Learner:
    """What a stage of training changes.

    Attributes:
      params: of the network.
      optimiser: state of the optimiser.
    """

    params: Params
    optimiser: Any


@dataclasses.dataclass(frozen=True)
class Network:
    """An acoustic model taken apart: its structure and what is not trained.

    Attributes:
      graph: structure, precision and ranges of every layer.
      constants: statistics of the features.
    """

    graph: Any
    constants: Any

    def model(self, params: Params) -> AcousticModel:
        """Put together with parameters."""
        return nnx.merge(self.graph, params["scales"], params["weights"], self.constants)


def take_apart(model: AcousticModel) -> tuple[Network, Params]:
    """The structure of a model, and its parameters."""
    graph, scales, weights, constants = nnx.split(model, Scale, nnx.Param, Statistics)
    pure = [nnx.to_pure_dict(state) for state in (scales, weights, constants)]
    return Network(graph, pure[2]), {"scales": pure[0], "weights": pure[1]}


def optimiser(
    steps: int, weight_rate: float, scale_rate: float, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW for weights and Adam for scales, warmed up and falling as a cosine; rate 0 freezes."""

    def adam(rate, decay):
        if not rate:
            return optax.set_to_zero()
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, rate, max(1, steps // 10), max(steps, 2), rate / 100
        )
        adamw = optax.adamw(schedule, weight_decay=decay)
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)

    transforms: dict[Hashable, Any] = {
        "weights": adam(weight_rate, weight_decay),
        "scales": in_logarithm(adam(scale_rate, 0.0)),
    }
    labels = {"weights": "weights", "scales": "scales"}
    return optax.partition(transforms, labels)


def in_logarithm(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Move the logarithms of parameters: a rate is a relative change, and steps stay positive."""

    def update(updates, state, params=None):
        slopes = jax.tree.map(jnp.multiply, updates, params)
        moves, state = inner.update(slopes, state, params)
        return jax.tree.map(lambda move, x: x * jnp.expm1(move), moves, params), state

    return optax.GradientTransformation(inner.init, update)


def make_step(
    network: Network,
    transform: optax.GradientTransformation,
    framing: Framing,
    config: Config,
    *,
    weights: Loss,
    teacher: tuple[Network, Params] | None = None,
) -> Callable[[Learner, Batch, Key[Array, ""]], tuple[Learner, Parts, Float[Array, ""]]]:
    """A compiled step: (learner, batch, key) -> (learner, parts of the loss, gradient norm).

    Args:
      network, transform: what learns, and how.
      framing: front end and labels.
      config: augmentation and devices.
      weights: of the loss.
      teacher: the float32 network to distil from.
    """
    mesh = RankMesh(nodes=config.devices, npus=1)

    def over_ranks(x):
        return jax.lax.psum(x, mesh.axes)

    def on_rank(params, teacher_params, batch, keys):
        features, lengths = features_of(batch, framing)
        if config.augment:
            features = augmented(keys, features, lengths, framing, config)
        target = None
        if teacher is not None:
            target, _ = teacher[0].model(teacher_params)(features, lengths)

        def share(params):
            records: list[Record] = []

            def watch(conv, x, y):
                if conv.precision != "float32" and (weights.local or weights.saturation):
                    records.append(conv.record(x, y, count_saturation=weights.saturation > 0))

            logits, frames = network.model(params)(features, lengths, watch=watch)
            parts = shares(logits, frames, batch, records, target, weights, over_ranks)
            return parts.total(weights), parts

        grads, parts = jax.grad(share, has_aux=True)(params)
        return over_ranks(grads), jax.tree.map(over_ranks, parts)

    lifted = on_every_rank(
        on_rank, mesh, (REPLICATED, REPLICATED, RANKED, RANKED), (REPLICATED, REPLICATED)
    )

    def split(x):
        return x.reshape(config.devices, -1, *x.shape[1:])

    # Two programs: the second is compiled once for all lengths of batches, and the first is the
    # same in every stage that has its loss, so that one is compiled for all of them.
    @jax.jit
    def slopes(params, teacher_params, batch, key):
        keys = jax.random.split(key, batch.lengths.shape[0])
        return lifted(params, teacher_params, jax.tree.map(split, batch), split(keys))

    @jax.jit
    def move(learner, grads):
        updates, state = transform.update(grads, learner.optimiser, learner.params)
        params: Any = optax.apply_updates(learner.params, updates)
        return Learner(params, state), optax.tree.norm(grads)

    teacher_params = None if teacher is None else teacher[1]

    def step(learner, batch, key):
        grads, parts = slopes(learner.params, teacher_params, batch, key)
        learner, norm = move(learner, grads)
        return learner, parts, norm

    return step


def features_of(batch: Batch, framing: Framing):
    """(log-mel features, frames of each) of a batch."""
    samples = jnp.asarray(batch.samples)
    return log_mel(samples, framing.front), framing.front.frames(jnp.asarray(batch.lengths))


def augmented(keys, features, lengths, framing: Framing, config: Config):
    """Features warped, coloured and masked, by each utterance's own key."""
    options, front = config.mask, framing.front
    own = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    if options.warp:
        features = warp_vocal_tract(own[:, 0], features, front, options.warp)
    if options.response_db:
        features = colour(own[:, 1], features, front, options.response_db)
    return spec_augment(own[:, 2], features, lengths, options)
