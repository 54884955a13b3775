"""Bytes that a plan needs on its fullest device, by part.

Mixed precision: parameters 2 bytes, gradients 4, optimizer 12 (master weights and two moments):
Megatron's 18 bytes a parameter, or 6 + 12 / D with its distributed optimizer.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from cmjax.hardware import Supernode
from cmjax.models.dense import DenseConfig, TensorSplit
from cmjax.models.dense.model import own_words
from cmjax.parallelism import pieces
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
    """Of the first or the last stage, whichever needs more."""
    stages = [_stage(model, plan, global_batch, precision, first=True)]
    if plan.pipeline > 1:
        stages.append(_stage(model, plan, global_batch, precision, first=False))
    return max(stages, key=lambda memory: memory.peak)


def fits(memory: Memory, machine: Supernode) -> bool:
    """Whether a device of the machine can hold it."""
    return memory.peak <= USABLE * float(machine.chip.hbm_bytes)


@functools.lru_cache(maxsize=4096)
def stage_parameters(model: DenseConfig, plan: Plan, *, first: bool) -> int:
    """Parameters of a device of the first or the last stage; with one stage, all of its rank."""
    split = split_of(plan)
    words = own_words(model, split) * model.hidden
    layers = model.layers // plan.pipeline * pieces.layer(model, split, plan.recompute).parameters
    ends = 0
    if first:
        ends += pieces.embedding(model, split).parameters
    if not first or plan.pipeline == 1:
        ends += pieces.output(model, split, plan.recompute).parameters
        ends -= int(model.query_layer) * pieces.layer(model, split, plan.recompute).parameters
        # The last stage has a copy of the words, which a single one shares.
        ends += words if plan.pipeline > 1 or not model.tied else 0
    return layers + ends


def split_of(plan: Plan) -> TensorSplit:
    return TensorSplit(plan.tensor, plan.sequence_parallel and plan.tensor > 1)


@functools.lru_cache(maxsize=4096)
def _at(size: Size, micro_batch: int) -> float:
    return float(size.evaluate({pieces.BATCH: float(micro_batch)}))


def _stage(
    model: DenseConfig, plan: Plan, global_batch: int, precision: Precision, *, first: bool
) -> Memory:
    split, micro_batches = split_of(plan), plan.micro_batches(global_batch)
    replicas, count = plan.data, float(stage_parameters(model, plan, first=first))
    dtype = precision.dtype
    layer = pieces.layer(model, split, plan.recompute, dtype)
    number = model.layers // plan.pipeline
    last = not first or plan.pipeline == 1

    def at(size: Size) -> float:
        return _at(size, plan.micro_batch)

    kept = number * at(layer.kept)
    if first:
        kept += at(pieces.embedding(model, split, dtype).kept)
    if last:
        output = pieces.output(model, split, plan.recompute, dtype)
        kept += at(output.kept) - (at(layer.kept) if model.query_layer else 0.0)
    flying = in_flight(plan.schedule, micro_batches, plan.pipeline, plan.interleave)
    if not first:
        flying = float(micro_batches) if plan.schedule == "gpipe" else 1.0
        if plan.interleave > 1:
            flying = min(
                float(micro_batches), plan.pipeline - (plan.pipeline - 1) / plan.interleave
            )
    # A layer's backward pass has the gradients of its widest array, before and after an
    # activation, and makes those of its parameters before they are added up.
    width = max(model.ffn, model.heads * model.sequence) / plan.tensor
    size = jnp.dtype(dtype).itemsize
    buffers = size * (2 * plan.micro_batch * model.sequence * width + layer.parameters)
    if plan.recompute != "none":
        whole = pieces.layer(model, split, "none", dtype)
        buffers += at(whole.kept) - at(layer.kept)
    if plan.optimizer == "zero3":
        buffers += 2 * precision.parameter * layer.parameters
    if plan.pipeline > 1:
        buffers += 2 * at(layer.passed)
    spread = {"none": (1, 1, 1), "zero1": (1, 1, replicas), "zero2": (1, replicas, replicas)}
    by = spread.get(plan.optimizer, (replicas, replicas, replicas))
    return Memory(
        parameters=precision.parameter * count / by[0],
        gradients=precision.gradient * count / by[1],
        optimizer=precision.optimizer * count / by[2],
        activations=flying * kept,
        buffers=buffers,
    )
