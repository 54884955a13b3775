"""A network made ready to run: filters packed once, one compiled call with nothing else around it.

speech -> log-mel -> network        whole
features -> network                 network
every layer with a short algorithm  backbone: more than one tap and no stride
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from cmjax.models.asr.acoustic import AcousticModel
from cmjax.models.asr.conv import Conv
from cmjax.models.asr.features import LogMel, log_mel
from cmjax.models.asr.frames import Frames

_MOST_BYTES_IN_PROGRAM = 1 << 15


def network_call(model: AcousticModel) -> Callable[[Array, Array], tuple[Array, Array]]:
    """(features, lengths) -> (logits, frames of each), of a packed copy of `model`."""
    return _compiled(model, lambda model, features, lengths: model(features, lengths))


def whole_call(
    model: AcousticModel, front: LogMel
) -> Callable[
    [Float[Array, "batch time"], Int[Array, "batch"]],
    tuple[Float[Array, "batch frames labels"], Int[Array, "batch"]],
]:
    """(samples, samples of each) -> (logits, frames of each), of a packed copy of `model`."""

    def whole(model, samples, lengths):
        return model(log_mel(samples, front), front.frames(lengths))

    return _compiled(model, whole)


def backbone_call(model: AcousticModel) -> Callable[[Sequence[Array]], list[Array]]:
    """Inputs of the layers of `backbone` -> their outputs, each by itself, of a packed copy."""

    def outputs(model, inputs):
        out = []
        for i, x in zip(backbone(model), inputs, strict=True):
            lengths = jnp.full(x.shape[:1], x.shape[1])
            out.append(model.convolutions()[i](Frames(x, lengths, jnp.zeros((), jnp.int32))).x)
        return out

    return _compiled(model, outputs)


def backbone(model: AcousticModel) -> list[int]:
    """Which convolutions a short algorithm can serve, but for the output layer."""
    convolutions = model.convolutions()
    return [i for i, conv in enumerate(convolutions[:-1]) if _has_short_algorithm(conv)]


def _has_short_algorithm(conv: Conv) -> bool:
    return conv.stride == 1 and conv.taps > 1


def _compiled(model: AcousticModel, function: Callable) -> Callable:
    """`function(model, ...)` as a jitted call.

    Filters are its arguments, in a list, which costs least to pass. What is small is part of the
    program, so that XLA computes what follows from steps and biases once, when it compiles.
    """
    deployed = nnx.clone(model)
    deployed.pack()
    graph, state = nnx.split(deployed)
    leaves, structure = jax.tree.flatten(state)
    passed = [i for i, leaf in enumerate(leaves) if leaf.nbytes > _MOST_BYTES_IN_PROGRAM]
    constants = [None if i in passed else np.asarray(leaf) for i, leaf in enumerate(leaves)]

    @jax.jit
    def call(filters, *args: Any):
        given = list(constants)
        for i, leaf in zip(passed, filters, strict=True):
            given[i] = leaf
        return function(nnx.merge(graph, jax.tree.unflatten(structure, given)), *args)

    filters = [leaves[i] for i in passed]
    return lambda *args: call(filters, *args)
