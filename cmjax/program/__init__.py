"""What a program does: a traced JAX function as operations with symbolic work."""

from cmjax.program.mark import ahead, fused, stream, trip_count
from cmjax.program.operation import Loop, Operation, Program, Source, Stream
from cmjax.program.rules import UnpricedPrimitive, cost_rule, exchange
from cmjax.program.shapes import SymbolicSize
from cmjax.program.size import Size, maximum, minimum
from cmjax.program.tiers import Axes, Tiers, ranks_on_tiers, tier_shares
from cmjax.program.trace import trace
from cmjax.program.work import FIELDS, Operand, Work, matmul_flops

__all__ = [
    "FIELDS",
    "Axes",
    "Loop",
    "Operand",
    "Operation",
    "Program",
    "Size",
    "Source",
    "Stream",
    "SymbolicSize",
    "Tiers",
    "UnpricedPrimitive",
    "Work",
    "ahead",
    "cost_rule",
    "exchange",
    "fused",
    "matmul_flops",
    "maximum",
    "minimum",
    "ranks_on_tiers",
    "stream",
    "tier_shares",
    "trace",
    "trip_count",
]
