"""Bytes that a plan needs on its fullest device, by part.

Mixed precision: parameters 2 bytes, gradients 4, optimizer 12 (master weights and two moments):
Megatron's 18 bytes a parameter, or 6 + 12 / D with its distributed optimizer.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from cmjax.hardware import Supernode
from cmjax.models.dense import DenseConfig, TensorSplit
from cmjax.models.dense.model import own_words
from cmjax.parallelism import pieces
from cmjax.parallelism.layerwise import Counts
from cmjax.parallelism.plan import Plan
from cmjax.parallelism.schedules import in_flight
from cmjax.program import Size

USABLE = 0.95
"""Of a device's memory: the rest is the runtime's (PanGu-alpha's pool was 31 of 32 GB), and what
an allocator cannot fill."""
PARTS = ("parameters", "gradients", "optimizer", "activations", "buffers")


@dataclasses.dataclass(frozen=True)
class Precision:
    """Bytes of a parameter, of its gradient and of its optimizer state, and the dtype in which the
    model computes."""

    parameter: float
    gradient: float
    optimizer: float
    dtype: Any


MIXED = Precision(2.0, 4.0, 12.0, pieces.HALF)
"""Half precision, with float32 gradients, master weights and two moments."""
SINGLE = Precision(4.0, 4.0, 8.0, jnp.float32)
"""float32 everywhere, as `train_step` runs by default: parameters are their own master weights."""
PARAMETER_BYTES = MIXED.parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the fullest device.

    Fields:
      parameters, gradients, optimizer: of the model's state.
      activations: kept between forward and backward passes.
      buffers: one layer's activations while it is computed again, the gradients that its backward
        pass works on, a layer's parameters while they are gathered, and what arrives from
        neighbouring stages.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def peak(self) -> float:
        return sum(getattr(self, part) for part in PARTS)


def memory_of(
    model: DenseConfig, plan: Plan, global_batch: int, precision: Precision = MIXED
) -> Memory:
    """Of the stage that needs most."""
    stages = [
        stage_memory(model, plan, global_batch, stage, counts, precision)
        for stage, counts in enumerate(plan.counts(model.layers))
    ]
    return max(stages, key=lambda memory: memory.peak)


def fits(memory: Memory, machine: Supernode) -> bool:
    """Whether a device of the machine can hold it."""
    return memory.peak <= USABLE * float(machine.chip.hbm_bytes)


def stage_parameters(model: DenseConfig, plan: Plan, stage: int, layers: int) -> int:
    """Parameters of a device of a stage, whose chunks have so many layers."""
    split = split_of(plan)
    words = own_words(model, split) * model.hidden
    layer = pieces.layer(model, split, "none").parameters
    ends = 0
    if stage == 0:
        ends += pieces.embedding(model, split).parameters
    if stage == plan.pipeline - 1:
        ends += pieces.output(model, split, "none").parameters
        ends -= int(model.query_layer) * layer
        # The last stage has a copy of the words, which a single one shares.
        ends += words if plan.pipeline > 1 or not model.tied else 0
    return plan.interleave * layers * layer + ends


def split_of(plan: Plan) -> TensorSplit:
    shared = plan.sequence_parallel and plan.tensor > 1
    return TensorSplit(plan.tensor, shared, context=plan.context)


@functools.lru_cache(maxsize=4096)
def _at(size: Size, micro_batch: int) -> float:
    return float(size.evaluate({pieces.BATCH: float(micro_batch)}))


def stage_memory(
    model: DenseConfig,
    plan: Plan,
    global_batch: int,
    stage: int,
    counts: Counts,
    precision: Precision = MIXED,
) -> Memory:
    """Of a device of one stage, whose chunks recompute `counts` of their layers: `plan.recompute`
    is not read, and where counts are arrays, so are activations and buffers."""
    split, micro_batches = split_of(plan), plan.micro_batches(global_batch)
    first, last = stage == 0, stage == plan.pipeline - 1
    replicas, count = plan.data, float(stage_parameters(model, plan, stage, counts.layers))
    dtype = precision.dtype
    used = counts.by_mode
    layers = {mode: pieces.layer(model, split, mode, dtype) for mode in used}

    def at(size: Size) -> float:
        return _at(size, plan.micro_batch)

    each = {mode: at(layer.kept) for mode, layer in layers.items()}
    if plan.schedule == "zero_bubble":
        # Gradients of weights wait, with the inputs of products and the gradients of their outputs:
        # 14 + 18 bytes an element of a GPT, as much as a layer keeps without its scores.
        waiting = at(pieces.layer(model, split, "selective", dtype).kept)
        each = {mode: max(nbytes, waiting) for mode, nbytes in each.items()}
    kept = plan.interleave * sum(number * each[mode] for mode, number in used.items())
    if first:
        kept = kept + at(pieces.embedding(model, split, dtype).kept)
    at_end = 0.0
    if last:
        for mode, here in counts.last.items():
            kept = kept - here * model.query_layer * each[mode]
            at_end = at_end + here * at(pieces.output(model, split, mode, dtype).kept)
    flying = in_flight(plan.schedule, micro_batches, plan.pipeline, plan.interleave, stage)
    # The loss is differentiated as soon as it is there, but under GPipe.
    at_end = at_end * (flying if plan.schedule == "gpipe" else 1.0)
    # A layer's backward pass has the gradients of its widest array, before and after an
    # activation, and makes those of its parameters before they are added up.
    width = max(model.ffn, model.heads * model.sequence) / plan.tensor
    size, layer = jnp.dtype(dtype).itemsize, pieces.layer(model, split, "none", dtype)
    tokens = plan.micro_batch * model.sequence / plan.context
    buffers = size * (2 * tokens * width + layer.parameters)
    again, freed = 0.0, 0.0
    for mode, number in used.items():  # the last layers first, as the backward pass goes
        whole = (number > 0) * (at(layer.kept) - at(layers[mode].kept))
        again = np.maximum(again, whole - freed)
        if plan.schedule != "zero_bubble":
            freed = freed + number * each[mode]
    buffers = buffers + again
    if plan.optimizer == "zero3":
        buffers = buffers + 2 * precision.parameter * layer.parameters
    if plan.pipeline > 1:
        buffers = buffers + 2 * at(layer.passed)
    spread = {"none": (1, 1, 1), "zero1": (1, 1, replicas), "zero2": (1, replicas, replicas)}
    by = spread.get(plan.optimizer, (replicas, replicas, replicas))
    return Memory(
        parameters=precision.parameter * count / by[0],
        gradients=precision.gradient * count / by[1],
        optimizer=precision.optimizer * count / by[2],
        activations=flying * kept + at_end,
        buffers=buffers,
    )
