"""The loss of quantization-aware training.

    L = task CTC + local sum_l |Y_l - Y_l^fp|^2 / |Y_l^fp|^2
        + teacher T^2 KL(softmax(z_fp / T) || softmax(z / T)) + saturation mean relu(|V| - q) / q

Y_l^fp is the layer in float32 on the same input (distillation from high-precision values, after Yao
et al., arXiv 2010.14841), z_fp the logits of the float32 network (Hinton et al., 2015), V what is
rounded to integers up to q. Sums are over all ranks, so that a batch split over devices has the
same loss; a rank's share is what it adds to them.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cmjax.models.asr.conv import Record
from cmjax.models.asr.ctc import ctc_loss
from train.asr.config import Loss
from train.data.batches import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """A rank's share of the parts of a loss, before their weights."""

    task: Float[Array, ""]
    local: Float[Array, ""]
    teacher: Float[Array, ""]
    saturation: Float[Array, ""]

    def total(self, weights: Loss) -> Float[Array, ""]:
        """Their weighted sum."""
        return (
            weights.task * self.task
            + weights.local * self.local
            + weights.teacher * self.teacher
            + weights.saturation * self.saturation
        )


def shares(
    logits: Float[Array, "batch frames labels"],
    frames: Int[Array, "batch"],
    batch: Batch,
    records: list[Record],
    teacher: Float[Array, "batch frames labels"] | None,
    weights: Loss,
    over_ranks: Callable[[Array], Array],
) -> Parts:
    """This rank's share of every part.

    Args:
      logits, frames: of the network in training, and frames of each utterance.
      batch: what they were computed from.
      records: what its quantized layers saw.
      teacher: logits of the float32 network, or None.
      weights: parts of weight 0 are not computed.
      over_ranks: sums a value over all ranks.
    """
    zero = jnp.zeros(())
    real = batch.lengths > 0
    labels = over_ranks(batch.counts.sum().astype(jnp.float32))
    ctc = ctc_loss(logits, frames, jnp.asarray(batch.labels), jnp.asarray(batch.counts))
    task = jnp.where(real, ctc, 0.0).sum() / labels
    local = saturation = distance = zero
    for record in records if weights.local else ():
        local += record.error / jax.lax.stop_gradient(over_ranks(record.power))
    for record in records if weights.saturation else ():
        saturation += record.excess / over_ranks(record.count) / len(records)
    if teacher is not None and weights.teacher:
        t = weights.temperature
        inside = jnp.arange(logits.shape[1]) < frames[:, None]
        wanted = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / t)
        found = jax.nn.log_softmax(logits / t)
        divergence = (jnp.exp(wanted) * (wanted - found)).sum(axis=-1)
        count = over_ranks(inside.sum().astype(jnp.float32))
        distance = t**2 * jnp.where(inside, divergence, 0.0).sum() / count
    return Parts(task=task, local=local, teacher=distance, saturation=saturation)
