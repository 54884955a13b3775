"""What PyTorch's frameworks do otherwise than JAX, of which measured runs are.

Their checkpoint computes the whole of a layer again, its last product and all-reduce included. The
core of attention, where no kernel fuses it, does not reach the rate of a stream of bytes: standard
attention in PyTorch moves 40.3 GB in 41.7 ms on an A100 of 1.555 TB/s (FlashAttention, arXiv
2205.14135, figure 2: GPT-2 medium, both passes, with dropout and masks), 62 % of its peak.
"""

import dataclasses
import functools
from collections.abc import Callable

from cmjax.hardware import Supernode
from cmjax.models.dense import CORE, DenseConfig
from cmjax.parallelism.plan import Plan
from cmjax.program import Operation, Program, Work

CORE_HBM = 40.3e9 / 41.7e-3 / 1.555e12
"""Of the peak of HBM, what kernels of attention that write its scores out reach."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eager:
    """A framework.

    Fields:
      overlaps: whether it exchanges the gradients of a layer's inputs among tensor-parallel ranks
        while it computes those of the weights, as Megatron-LM does from 2022 on (arXiv 2205.05198,
        section 4.2.2).
    """

    overlaps: bool = False

    def hidden_s(
        self, model: DenseConfig, plan: Plan, machine: Supernode, exchanging_s: float
    ) -> float:
        """Of the seconds in which a layer's backward pass exchanges, those in which it computes
        gradients of the weights whose inputs' gradients they are: of queries, keys, values, W_1."""
        if not self.overlaps or plan.tensor == 1:
            return 0.0
        # Of six exchanges of a part, two are of what comes in, before there is anything to compute.
        part = 4 / 6 if plan.sequence_parallel else 1.0
        columns = (model.heads + 2 * model.key_heads) * model.head_size
        columns += model.ffn * (2 if model.gated else 1)
        tokens = plan.micro_batch * model.sequence / plan.context
        flops = 2 * tokens * model.hidden * columns / plan.tensor
        rate = float(machine.chip.cube_flops_16bit) * float(machine.efficiency.gemm)
        return min(part * exchanging_s, flops / rate)


def of_core(operation: Operation) -> bool:
    """Whether an operation is of the core of attention."""
    return CORE in operation.scope


def of_exchange(operation: Operation) -> bool:
    """Whether it is a collective."""
    return operation.work.kind == "collective"


@functools.lru_cache(maxsize=512)
def only(program: Program, keep: Callable[[Operation], bool]) -> Program:
    """The program, whose other operations take no time."""
    nothing = Work(launches=0.0)
    operations = tuple(
        op if keep(op) else dataclasses.replace(op, work=nothing) for op in program.operations
    )
    return Program(operations, program.outputs, program.inputs)
